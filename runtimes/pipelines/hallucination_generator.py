"""The generator behind the hallucination detector: a text in, how likely it holds each of its tokens out."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from runtimes.errors import EngineError, InputError
from runtimes.tensors import Tensors
from runtimes.texts import TextPipeline, padded, read_texts
from runtimes.vllm_artifact import TOKEN_LOGPROBS

TOKENS_MIN = 2  # of the model's axis


class GeneratorPipeline(TextPipeline):
    """A request is `{"text": ...}`; an answer is `{"token_logprobs": [...], "perplexity": ...}`, in nats.

    The first token of a text has no log-probability: nothing comes before it. Of a longer text, the first `max_tokens`
    less one are read.
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
        if not np.isfinite(scores).all():
            raise EngineError("expected finite log-probabilities, found NaN or infinity; run export.verify")
        return [_answer(np.trim_zeros(row)) for row in scores]  # zero is what nothing predicts, and padding

    def example(self) -> Any:
        return {"text": "The bridge was opened in 1932. It is 1,149 metres long."}


def _answer(scores: np.ndarray) -> Any:
    return {"token_logprobs": scores.tolist(), "perplexity": float(np.exp(-scores.mean()))}


PIPELINE = GeneratorPipeline
