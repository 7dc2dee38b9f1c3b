"""The generator with AARF: a prompt becomes tokens, new tokens become an answer; `runtimes.generate` is its command."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from runtimes.errors import InputError
from runtimes.pipeline import Schema
from runtimes.pipelines.hallucination.decoding import Generated, Mitigation, open_generator
from runtimes.pipelines.hallucination.grounding import (
    EXAMPLE,
    Grounded,
    GroundedTokens,
    Span,
    prompt_schema,
    read_prompt,
)
from runtimes.runtime import Runtime
from runtimes.tensors import Tensors
from runtimes.text_pipeline import GeneratingPipeline, Option, Piece

NAMES = {"prompt", "contexts", "question"}
DEFAULTS = Mitigation()
NEW_TOKENS = 64  # of an answer, where the command line does not limit it
HEADS, LAYERS = "heads such as '25.0 18.13'", "layers such as '23 24'"
ENDS = ("</s>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>")  # of Llama, Mistral and Qwen2


class MitigatedPipeline(GeneratingPipeline):
    """A request is `{contexts, question}` or `{prompt}`; an answer is `{text, tokens: [{text, score, reweighted}]}`."""

    generates = True
    generation_target = "torch"
    prints_text = False  # the scores of the tokens are part of the answer
    generation_options = (
        Option(name="max_new_tokens", kind=int, meaning="tokens of the answer at most", default=NEW_TOKENS),
        Option(name="plain", kind=bool, meaning="score the tokens and reweight nothing"),
        Option(name="tau", kind=float, meaning="score above which a step is taken again", default=DEFAULTS.tau),
        Option(name="attend", kind=float, meaning="factor of the heads", default=DEFAULTS.attend),
        Option(name="know", kind=float, meaning="factor of the feed-forward parts", default=DEFAULTS.know),
        Option(name="alpha", kind=float, meaning="weight of PKS in the score", default=DEFAULTS.alpha),
        Option(name="beta", kind=float, meaning="weight of ECS in the score", default=DEFAULTS.beta),
        Option(name="heads", kind=str, meaning="heads to score and reweight, such as '25.0 18.13' (default: all)"),
        Option(name="layers", kind=str, meaning="layers to score and reweight, such as '23 24' (default: all)"),
    )
    generation_commands = (
        "hallucination_aarf --example > request.json",
        "hallucination_aarf --input request.json --max-new-tokens 64 --tau 0.4",
    )

    @classmethod
    def generation_example(cls) -> Any:
        return {name: value for name, value in EXAMPLE.items() if name in NAMES}

    @classmethod
    def generation_request(cls, request: Any | None, options: Mapping[str, Any]) -> Any:
        if request is None:
            raise InputError("expected --input FILE with a request, found none; --example prints one to start from")
        return request

    def generate(self, runtime: Runtime, request: Any, options: Mapping[str, Any]) -> Iterator[Piece]:
        """The whole answer, as one piece."""
        most = options.get("max_new_tokens", NEW_TOKENS)
        mitigation = None if options.get("plain") else read_mitigation(options)
        ids, prompt = self.prompt(request, most)
        generator = open_generator(runtime)
        yield self.answer(generator.generate(ids, prompt, max_new_tokens=most, mitigation=mitigation, ends=self.ends()))

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
        rows = zip(generated.ids, generated.scores, generated.reweighted, strict=True)
        return {
            "text": tokens.text(generated.ids),
            "tokens": [
                {"text": tokens.text([token]), "score": score, "reweighted": again} for token, score, again in rows
            ],
        }

    def encode(self, requests: Sequence[Any]) -> Tensors:
        raise InputError("expected a model that answers in one run; this one generates: python -m runtimes.generate")

    def decode(self, outputs: Mapping[str, np.ndarray]) -> list[Any]:
        raise InputError("expected a model that answers in one run; this one generates: python -m runtimes.generate")

    def example(self) -> Any:
        return self.generation_example()

    def schema(self) -> Schema:
        return prompt_schema()

    def _tokens(self, max_tokens: int) -> GroundedTokens:
        return GroundedTokens.load(self.assets, max_tokens=max_tokens, max_rows=1)


def read_mitigation(options: Mapping[str, Any]) -> Mitigation:
    """The mitigation of the options of a command line; `InputError` for heads or layers that are no numbers."""
    numbers = {name: options[name] for name in ("tau", "attend", "know", "alpha", "beta") if name in options}
    heads = [_head(text) for text in options["heads"].split()] if "heads" in options else None
    layers = [_number(text, LAYERS) for text in options["layers"].split()] if "layers" in options else None
    return Mitigation(**numbers, heads=heads, layers=layers)


def _head(text: str) -> tuple[int, int]:
    layer, _, head = text.partition(".")
    return _number(layer, HEADS), _number(head, HEADS)


def _number(text: str, expected: str) -> int:
    if not text.isdecimal():
        raise InputError(f"expected {expected}, found '{text}'")
    return int(text)
