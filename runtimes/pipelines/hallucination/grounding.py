"""An answer beside its context, as text and as tokens: requests, chunks, spans, truncation. Spans are [start, end)."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.artifact import read_json
from runtimes.errors import InputError, require
from runtimes.pipeline import TEXT, Schema, array, record, whole

Span = tuple[int, int]
Spans = tuple[Span, ...]
SENTENCE_END = re.compile(r"(?<=[.!?।])\s+|\n+")
TOKENIZER, TEMPLATE = "tokenizer.json", "template.json"  # files beside an artifact
JOINT = "\n\n"  # between contexts, and before the question
EXAMPLE = {
    "contexts": ["The bridge was opened in 1932. It is 1,149 metres long and carries eight lanes of traffic."],
    "question": "How long is the bridge?",
    "answer": "The bridge is 1,149 metres long. It was painted green in 2005.",
}


class TooLong(InputError):
    """An answer has more tokens than are read; a reader of many may leave it out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Grounded:
    """An answer and the prompt it was given to, with the spans of both that are compared, in characters."""

    prompt: str
    answer: str
    spans: Spans
    prompt_spans: Spans

    def cut(self, length: int) -> "Grounded":
        """With the first `length` characters of the prompt only; spans end there, and later ones are dropped."""
        spans = tuple((start, min(end, length)) for start, end in self.prompt_spans if start < length)
        return replace(self, prompt=self.prompt[:length], prompt_spans=spans)


@dataclass(frozen=True, kw_only=True, slots=True)
class Template:
    """The generator's chat format: the text before and after a prompt."""

    before: str
    after: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokenized:
    """A grounded answer in tokens.

    ids          all of it, template included
    prompt       the tokens of the prompt
    answer       the tokens of the answer
    spans        of the answer, in tokens from its first one
    prompt_spans of the prompt, in tokens of `ids`
    text         the texts that were read, the prompt perhaps cut
    """

    ids: tuple[int, ...]
    prompt: Span
    answer: Span
    spans: Spans
    prompt_spans: Spans
    text: Grounded


def read_request(request: Any, where: str, chunk_characters: int, most: tuple[int, int]) -> Grounded:
    """A request as `EXAMPLE` shows, or with a `prompt` in place of contexts; `InputError` for any other.

    `spans` and `prompt_spans` may be given; else the texts are split into at most `most` (answer, prompt) chunks.
    """
    names = {"prompt", "contexts", "question", "answer", "spans", "prompt_spans"}
    if not isinstance(request, dict) or not request.keys() <= names or "answer" not in request:
        raise InputError(
            f"{where}: expected an object with 'contexts' or 'prompt' and 'answer'; found {_show(request)}"
        )
    prompt, regions = read_prompt(request, where)
    answer = _text(request["answer"], f"{where}, answer")
    given = _spans(request, "spans", answer, where)
    given_prompt = _spans(request, "prompt_spans", prompt, where)
    return Grounded(
        prompt=prompt,
        answer=answer,
        spans=given or chunks(answer, ((0, len(answer)),), chunk_characters, most[0]),
        prompt_spans=given_prompt or chunks(prompt, regions, chunk_characters, most[1]),
    )


def read_prompt(request: Mapping[str, Any], where: str) -> tuple[str, Spans]:
    """The prompt of a request and the spans of its contexts; `InputError` if there is none or two."""
    if ("prompt" in request) == ("contexts" in request) or ("prompt" in request and "question" in request):
        raise InputError(
            f"{where}: expected either 'prompt' or 'contexts' and 'question', found {_show(sorted(request))}"
        )
    if "contexts" in request:
        return _joined(request, where)
    prompt = _text(request["prompt"], f"{where}, prompt")
    return prompt, ((0, len(prompt)),)


def request_schema(most: tuple[int, int]) -> Schema:
    """The schema of `read_request` with at most `most` spans of answer and prompt; it does not check their places."""
    spans, prompt_spans = (array(array(whole(0), 2, 2), 1, count) for count in most)
    more = {"spans": spans, "prompt_spans": prompt_spans}
    from_contexts = {"contexts": array(TEXT, 1), "answer": TEXT}
    return {
        "anyOf": [record({"prompt": TEXT, "answer": TEXT}, more), record(from_contexts, {**more, "question": TEXT})]
    }


def prompt_schema() -> Schema:
    """The schema of a request without an answer."""
    return {"anyOf": [record({"prompt": TEXT}), record({"contexts": array(TEXT, 1)}, {"question": TEXT})]}


def chunks(text: str, regions: Spans, characters: int, most: int) -> Spans:
    """Whole sentences up to `characters` together, none across a region; larger ones if there would be over `most`."""
    while True:
        found = tuple(
            chunk for region in regions for chunk in _merged(list(_pieces(text, region, characters)), characters)
        )
        if len(found) <= max(most, len(regions)):
            return found
        characters *= 2


def _pieces(text: str, region: Span, characters: int) -> Iterator[Span]:
    """Sentences without the space around them; one that is too long is cut at spaces where it has any."""
    start = region[0]
    ends = [match.span() for match in SENTENCE_END.finditer(text, *region)]
    for end, next_start in [*ends, (region[1], region[1])]:
        yield from _cut(text, _stripped(text, (start, end)), characters)
        start = next_start


def _cut(text: str, span: Span, characters: int) -> Iterator[Span]:
    start, end = span
    while end - start > characters:
        space = text.rfind(" ", start + 1, start + characters)
        middle = space if space > start else start + characters
        yield start, middle
        start, end = _stripped(text, (middle, end))
    if end > start:
        yield start, end


def _stripped(text: str, span: Span) -> Span:
    start, end = span
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    return start, end


def _merged(pieces: Sequence[Span], characters: int) -> Iterator[Span]:
    current: Span | None = None
    for piece in pieces:
        if current and piece[1] - current[0] <= characters:
            current = (current[0], piece[1])
        else:
            if current:
                yield current
            current = piece
    if current:
        yield current


class GroundedTokens:
    """The generator's tokenizer and chat format: a grounded answer becomes tokens."""

    def __init__(self, tokenizer_json: bytes, template: Template, *, max_tokens: int, max_rows: int) -> None:
        tokenizers = require("tokenizers", extra="hallucination")
        self._tokenizer = tokenizers.Tokenizer.from_buffer(tokenizer_json)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.template = template
        self.max_tokens, self.max_rows = max_tokens, max_rows

    @classmethod
    def load(cls, assets: Path, *, max_tokens: int, max_rows: int) -> "GroundedTokens":
        """Those in a folder; `InputError` if one of the two files is missing."""
        for name in (TOKENIZER, TEMPLATE):
            if not (assets / name).is_file():
                raise InputError(f"expected {name} in {assets}, found none; export the model again")
        template = Template(**read_json(assets / TEMPLATE))
        return cls((assets / TOKENIZER).read_bytes(), template, max_tokens=max_tokens, max_rows=max_rows)

    def text(self, ids: Sequence[int]) -> str:
        """The text of these tokens without special ones."""
        return str(self._tokenizer.decode(list(ids)))

    def known(self, tokens: Sequence[str]) -> list[int]:
        """The ids of those tokens that the vocabulary has."""
        found = map(self._tokenizer.token_to_id, tokens)
        return [number for number in found if number is not None]

    def read(self, text: Grounded, where: str) -> Tokenized:
        """The tokens; a prompt too long is cut at its end, the answer never. `TooLong` if no context is left."""
        read = self._read(text)
        while len(read.ids) > self.max_tokens:
            kept = read.prompt[1] - read.prompt[0] - (len(read.ids) - self.max_tokens)
            if kept < 1:
                raise TooLong(
                    f"{where}: expected an answer inside the context window of {self.max_tokens} tokens with some of "
                    f"its context, found {read.answer[1] - read.answer[0]} tokens of answer; give a shorter answer"
                )
            encoding = self._encode(self.template.before + read.text.prompt)
            end = encoding.offsets[read.prompt[0] + kept - 1][1] - len(self.template.before)
            read = self._read(read.text.cut(min(end, len(read.text.prompt) - 1)))
        if not read.prompt_spans or read.prompt[0] == read.prompt[1]:
            raise InputError(f"{where}: expected a context, found none in the {self.max_tokens} tokens that are read")
        length = read.answer[1] - read.answer[0]
        if length > self.max_rows:
            raise TooLong(f"{where}: expected an answer of at most {self.max_rows} tokens, found {length}")
        return read

    def _read(self, text: Grounded) -> Tokenized:
        before, after = self.template.before, self.template.after
        whole = before + text.prompt + after + text.answer
        encoding = self._encode(whole)
        offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        answer_at = len(before) + len(text.prompt) + len(after)
        prompt = covered(offsets, (len(before), len(before) + len(text.prompt)))
        answer = covered(offsets, (answer_at, len(whole)))
        return Tokenized(
            ids=tuple(encoding.ids),
            prompt=prompt,
            answer=answer,
            spans=tuple(_shifted(covered(offsets, _shifted(span, answer_at)), -answer[0]) for span in text.spans),
            prompt_spans=tuple(covered(offsets, _shifted(span, len(before))) for span in text.prompt_spans),
            text=text,
        )

    def _encode(self, text: str) -> Any:
        return self._tokenizer.encode(text, add_special_tokens=False)  # the template brings its own


def covered(offsets: np.ndarray, characters: Span) -> Span:
    """The tokens that share a character with the span; empty where none does."""
    shared = np.flatnonzero((offsets[:, 0] < characters[1]) & (offsets[:, 1] > characters[0]))
    return (int(shared[0]), int(shared[-1]) + 1) if len(shared) else (0, 0)


def labelled(spans: Spans, hallucinated: Spans) -> list[int]:
    """1 for each span that shares a character with a hallucinated one, else 0."""
    return [int(any(start < e and s < end for s, e in hallucinated)) for start, end in spans]


def _shifted(span: Span, by: int) -> Span:
    return span[0] + by, span[1] + by


def _joined(request: Mapping[str, Any], where: str) -> tuple[str, Spans]:
    """The prompt of contexts and a question, and the span of each context."""
    contexts = request["contexts"]
    if not isinstance(contexts, list) or not contexts:
        raise InputError(f"{where}, contexts: expected a list of texts, found {_show(contexts)}")
    prompt, regions = "", []
    for i, context in enumerate(contexts):
        prompt += _text(context, f"{where}, context {i}")
        regions.append((len(prompt) - len(context), len(prompt)))
        prompt += JOINT
    prompt += _text(request["question"], f"{where}, question") if "question" in request else ""
    prompt = prompt.rstrip()
    return prompt, tuple((start, min(end, len(prompt))) for start, end in regions)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InputError(
            f"{where}: expected a text, found {'an empty one' if isinstance(value, str) else _show(value)}"
        )
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise InputError(f"{where}: expected Unicode text, found half of a surrogate pair")
    return value


def _spans(request: Mapping[str, Any], name: str, text: str, where: str) -> Spans:
    """The spans the request gives, in order; empty if it gives none."""
    found = request.get(name)
    if found is None:
        return ()
    if not isinstance(found, list) or not found:
        raise InputError(f"{where}, {name}: expected a list of [start, end], found {_show(found)}")
    for span in found:
        right = isinstance(span, list | tuple) and len(span) == 2 and all(type(end) is int for end in span)
        if not right or not 0 <= span[0] < span[1] <= len(text):
            raise InputError(
                f"{where}, {name}: expected 0 <= start < end <= {len(text)}, the length of its text; "
                f"found {_show(span)}"
            )
    return tuple((start, end) for start, end in found)


def _show(value: Any) -> str:
    return ascii(value)[:80]
