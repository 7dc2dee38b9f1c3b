"""A frozen base with trained adapters, pooled, projected and normalised: a statement becomes a unit vector.

Shapes: B rows, T tokens, D width of the base, W width of the vectors. LoRA: Hu et al. (2021).
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from runtimes.errors import InputError, require
from training.models.statements.base import hidden_states, load_base, pool

BASE, ADAPTERS = "base.", "adapters."
WRAPPED, LORA = ".base_layer.", (".lora_A.", ".lora_B.")
NAME = "default."  # in peft's names of the only adapter


class StatementEmbedder(nn.Module):
    """Token ids and mask int64 [B, T] become unit vectors float32 [B, W].

    In its state dict the base has the names of its own files under `base.`, without the adapters, which are under
    `adapters.`, so that frozen and trained parameters have different prefixes.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.pooling = config["pooling"]
        self.base = with_adapters(load_base(config["base"], config["base_revision"]), config)
        self.projection = nn.Linear(self.base.config.hidden_size, config["width"])
        self.register_state_dict_post_hook(_tell_apart)
        self.register_load_state_dict_pre_hook(_put_together)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        states_BTD = hidden_states(self.base, input_ids, attention_mask)
        pooled_BD = pool(states_BTD, attention_mask, self.pooling)
        return (F.normalize(self.projection(pooled_BD.to(self.projection.weight.dtype)).float(), dim=-1),)


def with_adapters(base: Any, config: Mapping[str, Any]) -> Any:
    """`base` with a trained LoRA in every linear layer named in `lora_targets`; changed in place."""
    peft = require("peft", extra="statements")
    settings = peft.LoraConfig(
        r=config["lora_rank"],
        lora_alpha=config["lora_alpha"],
        lora_dropout=config["lora_dropout"],
        target_modules=config["lora_targets"].split(","),
    )
    try:
        return peft.inject_adapter_in_model(settings, base)
    except ValueError as error:
        linear = {name.rpartition(".")[2] for name, layer in base.named_modules() if isinstance(layer, nn.Linear)}
        raise InputError(
            f"{config['base']}: expected linear layers {config['lora_targets']}, found {', '.join(sorted(linear))}; "
            "name those to adapt by --lora_targets"
        ) from error


def merged(module: nn.Module) -> nn.Module:
    """`module` with its adapters added to the base's weights, W + (alpha / r) B A, and removed; changed in place."""
    for parent, name, layer in list(adapted_layers(module)):
        layer.merge()
        setattr(parent, name, layer.base_layer)
    return module


def adapted_layers(module: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """(parent, name, layer) of every linear layer with an adapter."""
    from peft.tuners.lora import LoraLayer

    for parent in module.modules():
        for name, child in parent.named_children():
            if isinstance(child, LoraLayer):
                yield parent, name, child


def _tell_apart(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in [name for name in state if name.startswith(prefix + BASE)]:
        state[prefix + _outside(name.removeprefix(prefix))] = state.pop(name)


def _put_together(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    wrapped = {name for name, layer in module.named_modules() if hasattr(layer, "base_layer")}
    for name in [name for name in state if name.startswith((prefix + BASE, prefix + ADAPTERS))]:
        state[prefix + _inside(name.removeprefix(prefix), wrapped)] = state.pop(name)


def _outside(name: str) -> str:
    """base.q.lora_A.default.weight -> adapters.q.lora_A.weight; base.q.base_layer.weight -> base.q.weight"""
    if any(part in name for part in LORA):
        return ADAPTERS + name.removeprefix(BASE).replace("." + NAME, ".")
    return name.replace(WRAPPED, ".")


def _inside(name: str, wrapped: set[str]) -> str:
    """The reverse of `_outside`; `wrapped` names the layers that have adapters."""
    if name.startswith(ADAPTERS):
        for part in LORA:
            name = name.replace(part, part + NAME)
        return BASE + name.removeprefix(ADAPTERS)
    layer, _, last = name.rpartition(".")
    return f"{layer}{WRAPPED}{last}" if layer in wrapped else name
