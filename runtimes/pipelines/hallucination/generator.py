"""The generator behind the hallucination detector: the log-probability of each token of a text, or its continuation."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from runtimes.errors import InputError
from runtimes.pipeline import TEXT, Schema, real, record, whole
from runtimes.runtime import Runtime
from runtimes.tensors import Tensors, require_finite
from runtimes.text_pipeline import TextPipeline, padded, read_texts
from runtimes.vllm.artifact import TOKEN_LOGPROBS
from runtimes.vllm.client import Completion

TOKENS_MIN = 2  # of the model's axis
LENGTH = "max_tokens"
SAMPLING: dict[str, Schema] = {LENGTH: whole(1), "temperature": real(0, 2), "top_p": real(0, 1), "seed": whole(0)}


@runtime_checkable
class Generates(Protocol):
    """A runtime that continues a text."""

    def complete(self, prompts: Sequence[str], **sampling: Any) -> list[Completion]: ...


class GeneratorPipeline(TextPipeline):
    """A request is `{"text": ...}`; an answer is `{"token_logprobs": [...], "perplexity": ...}`, in nats.

    The first token of a text has no log-probability: no token precedes it. Of a longer text, the first `max_tokens`
    less one are read.

    With `max_tokens` in the request, and perhaps `temperature` (0 if it is left out), `top_p` and `seed`, the answer is
    the continuation of the text: `{"text": ..., "finish_reason": ...}`.
    """

    tokenizer = "tokenizer.json"
    max_tokens = "max_tokens"
    keep = "first"

    def encode(self, requests: Sequence[Any]) -> Tensors:
        """`input_ids` and `attention_mask`, int64 [batch, tokens]."""
        rows = [row[: self.config["max_tokens"] - 1] for row in self.tokens.rows(read_texts(requests))]
        if not rows or min(map(len, rows)) < TOKENS_MIN:
            raise InputError(f"expected texts of {TOKENS_MIN} tokens or more, found a shorter one")
        ids, mask = padded(rows, self.tokens.pad)
        return {"input_ids": ids, "attention_mask": mask}

    def decode(self, outputs: Mapping[str, np.ndarray]) -> list[Any]:
        scores = outputs[TOKEN_LOGPROBS].astype(float)
        require_finite({TOKEN_LOGPROBS: scores})
        return [_answer(np.trim_zeros(row)) for row in scores]  # the first token and padding are zero

    def respond(self, runtime: Runtime, requests: Sequence[Any]) -> list[Any]:
        if not any(isinstance(request, dict) and LENGTH in request for request in requests):
            return super().respond(runtime, requests)
        if not isinstance(runtime, Generates):
            raise InputError(
                f"expected an engine that generates for a request with {LENGTH}, found {runtime.engine}; "
                "use --target vllm"
            )
        return [self.continuation(runtime, request) for request in requests]

    def continuation(self, runtime: Generates, request: Any) -> Any:
        """The continuation of the text of a request; `InputError` for a request of another kind."""
        sampling = {name: value for name, value in request.items() if name != "text" and value is not None}
        text = read_texts([{name: value for name, value in request.items() if name == "text"}])[0]
        if LENGTH not in sampling or not sampling.keys() <= SAMPLING.keys():
            expected = f"text, {LENGTH} and any of {', '.join(name for name in SAMPLING if name != LENGTH)}"
            raise InputError(f"expected a request with {expected}; found {', '.join(sorted(request))}")
        (completion,) = runtime.complete([text], **{"temperature": 0, **sampling})
        return {"text": completion.text, "finish_reason": completion.finish_reason}

    def schema(self) -> Schema:
        return record({"text": TEXT}, SAMPLING)

    def example(self) -> Any:
        return {"text": "The bridge was opened in 1932. It is 1,149 metres long."}


def _answer(scores: np.ndarray) -> Any:
    return {"token_logprobs": scores.tolist(), "perplexity": float(np.exp(-scores.mean()))}
