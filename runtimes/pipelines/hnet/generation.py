"""Generation with a byte language model: requests, and many texts that are generated together.

A request is `{"text": prompt, "max_bytes": 256, "temperature": 1.0, "top_k": 0, "seed": 0}`; all but `text` may be left
out, and the prompt may be empty. The output is UTF-8: a character is sent when it is complete.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtimes.errors import InputError
from runtimes.pipeline import TEXT, Schema, real, record, whole
from runtimes.pipelines.hnet.byte_text import BOS, VOCABULARY, Utf8Writer, check_text, choose
from runtimes.runtime import Runtime
from runtimes.tensors import BATCH, Signature, require_finite
from runtimes.text_pipeline import generate_one

PROMPT_BYTES, NEW_BYTES = 4096, 4096  # at most
DEFAULTS = {"max_bytes": 256, "temperature": 1.0, "top_k": 0, "seed": 0}
SCHEMA: Schema = record(
    {"text": TEXT},
    {
        "max_bytes": whole(1, NEW_BYTES),
        "temperature": real(0, 100),
        "top_k": whole(0, VOCABULARY),
        "seed": whole(0, 2**63 - 1),
    },
)
EXAMPLE = {"text": "తెలుగు", "max_bytes": 120, "temperature": 0.8, "seed": 1}


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """At most `max_bytes` after `prompt`; temperature 0 always takes the likeliest byte."""

    prompt: bytes
    max_bytes: int
    temperature: float
    top_k: int
    seed: int


def can_write(signature: Signature) -> bool:
    """Whether this is a step of a byte language model: a byte of each row and a state in, logits of the next out."""
    given = [(tensor.name, tensor.shape) for tensor in signature.free_inputs]
    returned = {tensor.name: tensor.shape for tensor in signature.visible_outputs}
    step = given == [("byte_ids", (BATCH, 1))] and returned.get("logits") == (BATCH, 1, VOCABULARY)
    return step and bool(signature.state)


def read_generation_request(request: Any, where: str) -> GenerationRequest:
    """The request, checked; `InputError` for a wrong one."""
    if not isinstance(request, dict) or not isinstance(request.get("text"), str):
        raise InputError(f'{where}: expected {{"text": "..."}}, found {ascii(request)[:60]}')
    if unknown := sorted(request.keys() - SCHEMA["properties"].keys()):
        raise InputError(f"{where}: expected fields {', '.join(SCHEMA['properties'])}; found {ascii(unknown[0])[:60]}")
    given = {**DEFAULTS, **{name: value for name, value in request.items() if value is not None}}
    prompt = check_text(given.pop("text"), where, PROMPT_BYTES, least=0)
    for name, value in given.items():
        bounds = SCHEMA["properties"][name]["anyOf"][0]
        kinds = (int, float) if bounds["type"] == "number" else (int,)
        right = type(value) in kinds and bounds["minimum"] <= value <= bounds["maximum"]
        if not right:
            raise InputError(
                f"{where}, {name}: expected a {'' if float in kinds else 'whole '}number from {bounds['minimum']} to "
                f"{bounds['maximum']}, found {ascii(value)[:60]}"
            )
    return GenerationRequest(prompt=prompt, **given)


class Writing:
    """A text in generation: `next` is the byte to read, first of the prompt, then the chosen ones.

    `finish_reason` is None during generation, then `stop`, where the model ended the text, or `length`. Each `row` of a
    batch has random numbers of its own.
    """

    def __init__(self, request: GenerationRequest, row: int = 0) -> None:
        self.request = request
        self.row = row
        self.next = BOS
        self.finish_reason: str | None = None
        self._prompt = iter(request.prompt)
        self._text = Utf8Writer(request.max_bytes)
        self._rng = np.random.default_rng((request.seed, row))

    def take(self, logits: np.ndarray) -> str:
        """Choose the byte after the one that was read; the character that it completes, or an empty text."""
        given = next(self._prompt, None)
        if given is not None:
            self.next = given
            return ""
        require_finite({"logits": logits})
        allowed = self._text.allowed()
        self.next = choose(logits, allowed, self._rng, temperature=self.request.temperature, top_k=self.request.top_k)
        if self._text.ends_with(self.next):
            self.finish_reason = "stop" if self.next == BOS else "length"
            return ""
        text = self._text.write(self.next)
        if self._text.full:
            self.finish_reason = "length"
        return text


class ContinuousBatcher:
    """Texts that are generated together: one step of the model reads a byte of each, at any place in each text.

    `runtime` is open and holds a step, else `InputError`. At most `places` texts fit, the batch that was verified.
    """

    def __init__(self, runtime: Runtime) -> None:
        if not can_write(runtime.signature):
            raise InputError(f"expected a step of a byte language model, found {runtime.artifact.name}")
        self.runtime = runtime
        self.places = runtime.signature.axis(BATCH).max
        self.writings: list[Writing] = []
        self._stream = runtime.carried(0)

    def add(self, writing: Writing) -> None:
        """The text begins at the next step."""
        if len(self.writings) == self.places:
            raise InputError(f"expected at most {self.places} texts at once, found one more")
        self._stream.choose([*range(len(self.writings)), None])
        self.writings.append(writing)

    def remove(self, writing: Writing) -> None:
        """Remove a text that is finished or cancelled; one that is not here is ignored."""
        kept = [row for row, each in enumerate(self.writings) if each is not writing]
        self._stream.choose(kept)
        self.writings = [self.writings[row] for row in kept]

    def step(self) -> list[tuple[Writing, str]]:
        """Every text with the character that this step completed; finished texts are removed."""
        ids = np.array([[writing.next] for writing in self.writings], np.int64)
        logits = self._stream.step({"byte_ids": ids})["logits"]
        printed = [(writing, writing.take(row[0])) for writing, row in zip(self.writings, logits, strict=True)]
        for writing, _ in printed:
            if writing.finish_reason:
                self.remove(writing)
        return printed


def write(runtime: Runtime, request: GenerationRequest) -> Iterator[dict[str, str]]:
    """`{"text": ...}` for every character, the last with `finish_reason`; each at the same cost."""
    return generate_one(ContinuousBatcher(runtime), Writing(request))
