"""Pipelines of texts: models that read them as padded rows of token ids, and models that generate them."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np

from runtimes.errors import InputError, require
from runtimes.pipeline import TEXT, Pipeline, Schema, all_pipelines, record, refuse_no_requests
from runtimes.runtime import Runtime
from runtimes.tensors import Tensors, require_finite

PADS = ("<pad>", "[PAD]")
Keep = Literal["last", "first"]
Piece = Mapping[str, Any]  # the next part of an answer; the last one may have more fields


class Tokens:
    """A tokenizer.json that keeps the last or the first `max_tokens` of a text, special tokens included."""

    def __init__(self, tokenizer_json: bytes, max_tokens: int, keep: Keep = "last") -> None:
        tokenizers = require("tokenizers", extra="text")
        self._tokenizer = tokenizers.Tokenizer.from_buffer(tokenizer_json)
        self._tokenizer.enable_truncation(max_tokens, direction="left" if keep == "last" else "right")
        self._tokenizer.no_padding()
        pads = (self._tokenizer.token_to_id(pad) for pad in PADS)
        self.pad = next((pad for pad in pads if pad is not None), 0)

    @classmethod
    def load(cls, path: Path, max_tokens: int, keep: Keep = "last") -> "Tokens":
        """The tokenizer in a file; `InputError` if there is none."""
        if not path.is_file():
            raise InputError(f"expected a tokenizer at {path}, found none; export the model again")
        return cls(path.read_bytes(), max_tokens, keep)

    def rows(self, texts: Sequence[str | tuple[str, str]]) -> list[np.ndarray]:
        """The token ids of each text, int64; a text may be a pair. `InputError` for a text that is not Unicode."""
        try:
            return [np.array(encoding.ids, np.int64) for encoding in self._tokenizer.encode_batch(list(texts))]
        except TypeError as error:  # JSON may hold "\ud800", which Python keeps in a string
            wrong = next(i for i, text in enumerate(texts) if not is_unicode(text))
            raise InputError(f"text {wrong}: expected Unicode, found half a surrogate pair") from error

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """The number of tokens of each text, once it is cut."""
        return [len(row) for row in self.rows(texts)]

    def ids(self, texts: Sequence[str | tuple[str, str]]) -> np.ndarray:
        """int64 [texts, tokens], padded on the right to the longest."""
        return padded(self.rows(texts), self.pad)[0]


def is_unicode(text: str | tuple[str, str]) -> bool:
    """False for a text with half a surrogate pair, which has no bytes in UTF-8."""
    return not any("\ud800" <= character <= "\udfff" for part in text for character in part)


def padded(rows: Sequence[np.ndarray], pad: int, least: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Rows of token ids padded on the right to the longest, or to `least`, and the mask of real tokens.

    Both int64 [rows, tokens].
    """
    ids = np.full((len(rows), max(least, *map(len, rows))), pad, np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
    return ids, mask


class TextPipeline(Pipeline):
    """A request is `{"text": ...}`; an answer is `{"vector": [...]}`."""

    tokenizer: str
    max_tokens: str  # the setting that holds it
    keep: Keep = "last"

    def __init__(self, config: Mapping[str, Any], assets: Path) -> None:
        super().__init__(config, assets)
        self.tokens = Tokens.load(assets / self.tokenizer, config[self.max_tokens], self.keep)

    def encode(self, requests: Sequence[Any]) -> Tensors:
        """`token_ids` int64 [batch, tokens]."""
        return {"token_ids": self.tokens.ids(read_texts(requests))}

    def decode(self, outputs: Mapping[str, np.ndarray]) -> list[Any]:
        require_finite(outputs)
        (vectors,) = outputs.values()
        return [{"vector": row.tolist()} for row in vectors]

    def schema(self) -> Schema:
        return record({"text": TEXT})

    def example(self) -> Any:
        return {"text": "I lost my job last week and I cannot sleep."}


def read_texts(requests: Sequence[Any]) -> list[str]:
    """The text of each request; `InputError` for no request, or with the number of one that is none."""
    refuse_no_requests(requests)
    for i, request in enumerate(requests):
        if not isinstance(request, dict) or request.keys() != {"text"} or not isinstance(request["text"], str):
            raise InputError(f"request {i}: expected an object with a string 'text'; found {ascii(request)[:80]}")
    return [request["text"] for request in requests]


# Generation


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One option of `runtimes.generate` that a pipeline adds: `--max-bytes` for the name `max_bytes`.

    `kind` parses its value; `bool` is a flag without one. Names are unique among all pipelines.
    """

    name: str
    kind: Callable[[str], Any]
    meaning: str
    default: Any = None


class GeneratingPipeline(Pipeline):
    """A pipeline that generates.

    generation_target    target of the artifact where the command line names none
    generation_options   options of the command line that only this pipeline has
    generation_commands  arguments of the command to paste, for its help
    prints_text          whether the command prints the text of the pieces, else each piece as JSON
    name_suffix          end of the model's name that the command line may leave out
    """

    generation_target: ClassVar[str]
    generation_options: ClassVar[tuple[Option, ...]] = ()
    generation_commands: ClassVar[tuple[str, ...]] = ()
    prints_text: ClassVar[bool] = True
    name_suffix: ClassVar[str] = ""

    @classmethod
    @abstractmethod
    def generation_example(cls) -> Any:
        """A valid request, short enough to read."""

    @classmethod
    @abstractmethod
    def generation_request(cls, request: Any | None, options: Mapping[str, Any]) -> Any:
        """The request of a file, or None without one, together with the options that were given."""

    @abstractmethod
    def generate(self, runtime: Runtime, request: Any, options: Mapping[str, Any]) -> Iterator[Piece]:
        """The pieces of the answer as they are generated by an open runtime."""


class Writing(Protocol):
    """One text that is being generated; `finish_reason` is None until it ends."""

    @property
    def finish_reason(self) -> str | None: ...


class Batcher(Protocol):
    """Texts that are generated together, at most `places` of them; they begin and end at different steps."""

    places: int

    @property
    def writings(self) -> Sequence[Any]: ...

    def add(self, writing: Any) -> None: ...

    def remove(self, writing: Any) -> None: ...

    def step(self) -> list[tuple[Any, str]]: ...


class BatchingPipeline(GeneratingPipeline):
    """A pipeline that generates many texts together, so that Triton can stream them to many clients.

    generation_schema  JSON Schema of a request
    served_suffix      takes the place of `name_suffix` in the name under which Triton serves the generation
    """

    generation_schema: ClassVar[Schema]
    served_suffix: ClassVar[str]

    @classmethod
    def served_name(cls, model: str) -> str:
        """The name under which Triton serves the generation by `model`."""
        return model.removesuffix(cls.name_suffix) + cls.served_suffix

    @abstractmethod
    def begin(self, request: Any, where: str) -> Any:
        """A text that begins with the prompt of the request; `InputError` for a wrong request."""

    @abstractmethod
    def batcher(self, runtime: Runtime) -> Batcher:
        """A batcher without texts on an open runtime; `InputError` unless the artifact generates."""

    def generate(self, runtime: Runtime, request: Any, options: Mapping[str, Any]) -> Iterator[Piece]:
        return generate_one(self.batcher(runtime), self.begin(request, "request"))


def generate_one(batcher: Batcher, writing: Any) -> Iterator[dict[str, str]]:
    """`{"text": ...}` for every character of a text, the last with `finish_reason`."""
    batcher.add(writing)
    while writing.finish_reason is None:
        for _, text in batcher.step():
            if text or writing.finish_reason:
                yield piece(text, writing)


def piece(text: str, writing: Writing) -> dict[str, str]:
    """A piece of text as it is sent; the last one has the reason of the end."""
    return {"text": text} | ({"finish_reason": writing.finish_reason} if writing.finish_reason else {})


def generating_pipelines() -> dict[str, type[GeneratingPipeline]]:
    """The pipelines that generate, by name."""
    return {name: each for name, each in all_pipelines().items() if issubclass(each, GeneratingPipeline)}
