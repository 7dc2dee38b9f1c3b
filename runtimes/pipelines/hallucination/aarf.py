"""The generator with AARF: a prompt becomes tokens, new tokens become an answer. `runtimes.generate` asks it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from runtimes.errors import InputError
from runtimes.pipeline import Pipeline, Schema
from runtimes.pipelines.hallucination.decoding import Generated
from runtimes.pipelines.hallucination.grounding import (
    EXAMPLE,
    Grounded,
    GroundedTokens,
    Span,
    prompt_schema,
    read_prompt,
)
from runtimes.tensors import Tensors

NAMES = {"prompt", "contexts", "question"}
ENDS = ("</s>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>")  # of Llama, Mistral and Qwen2


class MitigatedPipeline(Pipeline):
    """A request is `{contexts, question}` or `{prompt}`; an answer is `{text, tokens: [{text, score, reweighted}]}`."""

    generates = True

    def prompt(self, request: Any, max_new_tokens: int) -> tuple[list[int], Span]:
        """The tokens of a request, cut to leave room for new ones, and where its context is among them."""
        if not isinstance(request, dict) or not request.keys() <= NAMES:
            raise InputError(
                f"expected an object with 'contexts' and 'question', or 'prompt', and no more; "
                f"found {ascii(sorted(request) if isinstance(request, dict) else request)[:80]}"
            )
        prompt, regions = read_prompt(request, "request")
        room = self.config["max_tokens"] - max_new_tokens
        if max_new_tokens < 1 or room < self.config["min_tokens"]:
            most = self.config["max_tokens"] - self.config["min_tokens"]
            raise InputError(f"expected 1 to {most} new tokens, found {max_new_tokens}")
        text = Grounded(prompt=prompt, answer="", spans=(), prompt_spans=regions).cut(self.config["max_characters"])
        read = self._tokens(room).read(text, "request")
        return list(read.ids), read.prompt if self.config["columns"] == "prompt" else (0, len(read.ids))

    def ends(self) -> list[int]:
        """The ids of the tokens that end an answer."""
        return self._tokens(self.config["max_tokens"]).known(ENDS)

    def answer(self, generated: Generated) -> Any:
        tokens = self._tokens(self.config["max_tokens"])
        told = zip(generated.ids, generated.scores, generated.reweighted, strict=True)
        return {
            "text": tokens.text(generated.ids),
            "tokens": [
                {"text": tokens.text([token]), "score": score, "reweighted": again} for token, score, again in told
            ],
        }

    def encode(self, requests: Sequence[Any]) -> Tensors:
        raise InputError("expected a model that answers in one run; this one generates: python -m runtimes.generate")

    def decode(self, outputs: Mapping[str, np.ndarray]) -> list[Any]:
        raise InputError("expected a model that answers in one run; this one generates: python -m runtimes.generate")

    def example(self) -> Any:
        return {name: value for name, value in EXAMPLE.items() if name in NAMES}

    def schema(self) -> Schema:
        return prompt_schema()

    def _tokens(self, max_tokens: int) -> GroundedTokens:
        return GroundedTokens.load(self.assets, max_tokens=max_tokens, max_rows=1)
