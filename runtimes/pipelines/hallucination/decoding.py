"""Generation token by token by a program that keeps keys and values; AARF is its option.

The program (`hallucination_aarf`) reads new tokens behind a past and gives, of the last position, the logits and the
features of ReDeEP. A token's score is PKS less ECS (equation 6). Where it is above tau, the step of that token is taken
again with the chosen heads' outputs times `attend` and the chosen layers' feed-forward outputs times `know`; the keys
and values that are kept are those of the plain reading, so that no later score depends on it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from runtimes.errors import InputError, require
from runtimes.runtime import Runtime
from runtimes.tensors import Signature

if TYPE_CHECKING:
    from torch import Tensor

Head = tuple[int, int]
Step = Callable[[Mapping[str, "Tensor"]], Mapping[str, "Tensor"]]
INPUTS = {"token_ids", "keys", "values", "finals", "prompt_range", "attend", "know"}
KEPT = {"keys": 3, "values": 3, "finals": 1}  # cached tensors, and the axis of the tokens in each


@dataclass(frozen=True, kw_only=True, slots=True)
class Mitigation:
    """The settings of AARF; defaults are the paper's for Llama-2 7B on RAGTruth.

    tau          scores above it are those of hallucinations
    attend       factor of the chosen heads, know of the chosen layers' feed-forward parts
    alpha, beta  weights of PKS and of ECS in the score
    heads        (layer, head) that are scored and reweighted, and layers; None is all that the model scores
    """

    tau: float = 0.4
    attend: float = 5.0
    know: float = 0.2
    alpha: float = 1.0
    beta: float = 1.0
    heads: Sequence[Head] | None = None
    layers: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.attend < 1 or not 0 <= self.know <= 1:
            raise InputError(f"AARF: expected attend >= 1 and know in 0..1, found {self.attend} and {self.know}")
        if self.heads == [] or self.layers == []:
            raise InputError("AARF: expected heads and layers to reweight, found none")


@dataclass(slots=True)
class Generated:
    """The new tokens, the score of each, and whether its step was taken again."""

    ids: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    reweighted: list[bool] = field(default_factory=list)


@runtime_checkable
class DeviceRuntime(Protocol):
    """An engine that computes on tensors of torch on their device."""

    def call(self, inputs: Mapping[str, Any]) -> dict[str, Any]: ...


def likeliest(logits: np.ndarray) -> int:
    """The number of the largest logit, the first among equals."""
    return int(logits.argmax())


@dataclass(frozen=True, kw_only=True, slots=True)
class Generator:
    """A program's `step` with the heads and layers whose features it gives, in order."""

    step: Step
    signature: Signature
    heads: Sequence[Head]
    layers: Sequence[int]
    device: str = "cpu"

    def generate(
        self,
        ids: Sequence[int],
        prompt: tuple[int, int],
        *,
        max_new_tokens: int,
        mitigation: Mitigation | None = None,
        ends: Sequence[int] = (),
        choose: Callable[[np.ndarray], int] = likeliest,
    ) -> Generated:
        """The tokens after `ids`, whose places `prompt` hold the context, up to one of `ends`.

        Every token is scored; none is reweighted without a mitigation. `choose` takes the next token from the logits.
        """
        torch = require("torch", extra="export")
        self._refuse_too_long(len(ids), prompt, max_new_tokens)
        watched = mitigation or Mitigation(tau=float("inf"))
        plain, again, weights = self._factors(watched, weighted=False), self._factors(watched), self._weights(watched)
        given = {"prompt_range": torch.tensor([prompt], device=self.device)}
        kept = KVCache(self.signature, len(ids) + max_new_tokens, self.device)
        result, new = Generated(), list(ids)
        for _ in range(max_new_tokens):
            tokens = torch.tensor([new], device=self.device)
            printed = self.step({"token_ids": tokens, **kept.rows(), **given, **plain})
            score = float(printed["pks"][0] @ weights["pks"] - printed["ecs"][0] @ weights["ecs"])
            kept.add(printed)
            taken_again = score > watched.tau
            if taken_again:
                printed = self.step({"token_ids": tokens[:, -1:], **kept.rows(but=1), **given, **again})
            new = [choose(printed["logits"][0].float().cpu().numpy())]
            result.ids += new
            result.scores.append(score)
            result.reweighted.append(taken_again)
            if new[0] in ends:
                break
        return result

    def _factors(self, mitigation: Mitigation, *, weighted: bool = True) -> dict[str, "Tensor"]:
        """Factors of heads and feed-forward parts: 1, or for the chosen ones those of the mitigation."""
        torch = require("torch", extra="export")
        shapes = {tensor.name: tensor.resolve({"batch": 1}) for tensor in self.signature.inputs[-2:]}
        result = {name: torch.ones(shape, device=self.device) for name, shape in shapes.items()}
        if weighted:
            for layer, head in self._chosen("head", mitigation.heads, self.heads):
                result["attend"][0, layer, head] = mitigation.attend
            for layer in self._chosen("layer", mitigation.layers, self.layers):
                result["know"][0, layer] = mitigation.know
        return result

    def _weights(self, mitigation: Mitigation) -> dict[str, "Tensor"]:
        """The weight of each feature in a token's score."""
        torch = require("torch", extra="export")
        heads = self._chosen("head", mitigation.heads, self.heads)
        layers = self._chosen("layer", mitigation.layers, self.layers)
        ecs = [mitigation.beta * (head in heads) for head in self.heads]
        pks = [mitigation.alpha * (layer in layers) for layer in self.layers]
        return {
            name: torch.tensor(list(map(float, row)), device=self.device) for name, row in (("ecs", ecs), ("pks", pks))
        }

    @staticmethod
    def _chosen(what: str, wanted: Sequence[Any] | None, known: Sequence[Any]) -> Sequence[Any]:
        if wanted is None:
            return known
        unknown = [each for each in wanted if each not in known]
        if unknown:
            raise InputError(
                f"AARF: expected {what}s that the model scores ({_listed(known)}), found {_listed(unknown)}; "
                f"fit it with --{what}s that include them"
            )
        return wanted

    def _refuse_too_long(self, length: int, prompt: tuple[int, int], new: int) -> None:
        most = min(self.signature.axis("past").max, self.signature.axis("tokens").max)
        if new < 1 or not length >= 1 or length + new > most:
            raise InputError(
                f"expected 1 or more tokens and 1 or more new ones, together at most {most}; found {length} and {new}"
            )
        if not 0 <= prompt[0] < prompt[1] <= length:
            raise InputError(f"expected a context inside the {length} tokens, found places {prompt[0]} to {prompt[1]}")


def open_generator(runtime: Runtime) -> Generator:
    """The generator of an open runtime; keys and values stay on its device from token to token.

    `InputError` for an engine that only takes arrays, and for an artifact that does not generate.
    """
    if not {tensor.name for tensor in runtime.signature.inputs} >= INPUTS:
        raise InputError(f"expected an artifact that generates, found {runtime.artifact.name}")
    if not isinstance(runtime, DeviceRuntime):
        raise InputError(f"expected an engine that takes tensors of torch, found {runtime.engine}; use --target torch")
    config = runtime.artifact.config
    heads = sorted(
        (int(layer), int(head)) for layer, head in (text.split(".") for text in set(config["heads"].split()))
    )
    layers = sorted(map(int, set(config["layers"].split())))
    return Generator(step=runtime.call, signature=runtime.signature, heads=heads, layers=layers, device=runtime.device)


class KVCache:
    """Keys, values and final states of the tokens so far, behind one row that is never attended to."""

    def __init__(self, signature: Signature, tokens: int, device: str) -> None:
        torch = require("torch", extra="export")
        sizes = {"batch": 1, "past": tokens + 1}
        self.length = 1
        self.held = {
            tensor.name: torch.zeros(tensor.resolve(sizes), device=device)
            for tensor in signature.inputs
            if tensor.name in KEPT
        }

    def rows(self, *, but: int = 0) -> dict[str, "Tensor"]:
        """The cache without its last `but` tokens."""
        return {name: held.narrow(KEPT[name], 0, self.length - but) for name, held in self.held.items()}

    def add(self, printed: Mapping[str, "Tensor"]) -> None:
        """Append the keys, values and final states of a step's new tokens."""
        new = printed["new_finals"].shape[1]
        for name, held in self.held.items():
            held.narrow(KEPT[name], self.length, new).copy_(printed[f"new_{name}"])
        self.length += new


def _listed(names: Sequence[Any], most: int = 4) -> str:
    shown = ", ".join(".".join(map(str, name)) if isinstance(name, tuple) else str(name) for name in names[:most])
    return f"{shown}, ..." if len(names) > most else shown
