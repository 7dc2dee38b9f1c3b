"""AARF: generation that listens more to the context wherever the detector would call the next token hallucinated.

At each step the token's score H is that of ReDeEP's equation 6 (PKS of the chosen layers less ECS of the chosen heads).
Where it is above tau, the step is taken again with the chosen heads' outputs times `attend` and the chosen layers'
feed-forward outputs times `know`. Source: Sun et al., ReDeEP, ICLR 2025, section 5; their code scales the output of the
attention block where the paper, and this, scale that of the feed-forward part.

Shapes: T tokens so far, D width, A heads, C width of a head, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from runtimes.errors import InputError
from training.models.hallucination.decoder import Decoder, View
from training.models.hallucination.features import knowledge, resemblance, top_share
from training.models.hallucination.units import Head


@dataclass(frozen=True, kw_only=True, slots=True)
class Mitigation:
    """What AARF does, with the paper's numbers for Llama-2 7B on RAGTruth.

    alpha, beta  weights of PKS and of ECS in the score of a token
    """

    heads: Sequence[Head]
    layers: Sequence[int]
    tau: float = 0.4
    attend: float = 5.0
    know: float = 0.2
    alpha: float = 1.0
    beta: float = 1.0
    percent: int = 10

    def __post_init__(self) -> None:
        if not self.heads or not self.layers:
            raise InputError("AARF: expected heads and layers to reweight, found none")
        if self.attend < 1 or not 0 <= self.know <= 1:
            raise InputError(f"AARF: expected attend >= 1 and know in 0..1, found {self.attend} and {self.know}")


@dataclass(slots=True)
class Generated:
    """The new tokens, the score of each, and whether its step was taken again."""

    ids: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    reweighted: list[bool] = field(default_factory=list)


@torch.inference_mode()
def generate(
    decoder: Decoder,
    ids_T: Tensor,
    prompt: tuple[int, int],
    *,
    max_new_tokens: int,
    mitigation: Mitigation | None = None,
    choose: Callable[[Tensor], int] = lambda logits_V: int(logits_V.argmax()),
) -> Generated:
    """What follows the tokens `ids_T`, whose places `prompt` hold the context; greedy unless `choose` draws.

    Without a mitigation nothing is scored and nothing is changed.
    """
    result = Generated()
    model = decoder.model
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    reading = Reading(decoder, ids_T, mitigation) if mitigation else None
    for _ in range(max_new_tokens):
        logits_V, score = reading.step(prompt) if reading else (_logits(model, ids_T), 0.0)
        again = mitigation is not None and score > mitigation.tau
        if again and mitigation:
            with reweighted(decoder, mitigation):
                logits_V = _logits(model, ids_T)
        token = choose(logits_V)
        ids_T = torch.cat([ids_T, ids_T.new_tensor([token])])
        if reading:
            reading.ids_T = ids_T
        result.ids.append(token)
        result.scores.append(score)
        result.reweighted.append(again)
        if token in ends:
            break
    return result


class Reading:
    """The text so far, read layer by layer for what the last position says next and how it came to that."""

    def __init__(self, decoder: Decoder, ids_T: Tensor, mitigation: Mitigation) -> None:
        self.decoder, self.ids_T, self.mitigation = decoder, ids_T, mitigation
        self.chosen: dict[int, list[int]] = {}
        for layer, head in mitigation.heads:
            self.chosen.setdefault(layer, []).append(head)

    def step(self, prompt: tuple[int, int]) -> tuple[Tensor, float]:
        """(logits [V], score) of the last position."""
        rows_11 = torch.tensor([[len(self.ids_T) - 1]], device=self.ids_T.device)
        range_12 = torch.tensor([prompt], device=self.ids_T.device)
        known, chosen, last = 0.0, [], None
        for view in self.decoder.layers(self.ids_T[None], len(self.decoder.model.model.layers)):
            if view.number in self.mitigation.layers:
                known += float(knowledge(self.decoder, view, rows_11, "paper", by_chunk=False))
            chosen += self._chosen(view, rows_11, range_12)
            last = view.after
        assert last is not None  # a model has layers
        final_1TD = self.decoder.normed(last)
        used = sum(float(resemblance(mask, final_1TD, rows_11).sum()) for mask in chosen)
        logits_V = self.decoder.model.lm_head(final_1TD[0, -1]).float()
        return logits_V, self.mitigation.alpha * known - self.mitigation.beta * used

    def _chosen(self, view: View, rows_11: Tensor, range_12: Tensor) -> list[Tensor]:
        heads = self.chosen.get(view.number)
        if not heads:
            return []
        attention = view.attention(heads, rows_11)
        return [top_share(attention, range_12, self.mitigation.percent, len(self.ids_T))[0]]


@contextmanager
def reweighted(decoder: Decoder, mitigation: Mitigation) -> Iterator[None]:
    """Within it, the model's chosen heads count `attend` times and its chosen feed-forward parts `know` times."""
    layers = decoder.model.model.layers
    with ExitStack() as hooks:
        for number in sorted({layer for layer, _ in mitigation.heads}):
            attention = layers[number].self_attn
            own = [head for layer, head in mitigation.heads if layer == number]
            scale_head = _scales_heads(own, attention.head_dim, mitigation.attend)
            hooks.callback(attention.o_proj.register_forward_pre_hook(scale_head).remove)
        for number in mitigation.layers:
            hooks.callback(layers[number].mlp.register_forward_hook(_scales(mitigation.know)).remove)
        yield


def _scales_heads(heads: Sequence[int], width: int, factor: float) -> Any:
    """A hook before the output projection, whose input has the heads side by side."""

    def scale(_: Any, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        mixed = given[0].clone()
        for head in heads:
            mixed[..., head * width : (head + 1) * width] *= factor
        return (mixed, *given[1:])

    return scale


def _scales(factor: float) -> Any:
    def scale(_: Any, given: Any, out: Tensor) -> Tensor:
        return out * factor

    return scale


def _logits(model: Any, ids_T: Tensor) -> Tensor:
    """[V]: what the model says next."""
    logits: Tensor = model(ids_T[None], use_cache=False, logits_to_keep=1).logits[0, -1].float()
    return logits
