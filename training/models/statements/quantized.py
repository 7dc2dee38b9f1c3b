"""QLoRA: the base in four bits (NF4, doubly quantized) while its adapters are trained (Dettmers et al., 2023)."""

import copy

from torch import nn

from runtimes.errors import require
from training.models.statements.module import adapted_layers


def four_bit_twin(module: nn.Module) -> nn.Module:
    """A module that trains the adapters and the projection of `module` itself, over a base in four bits.

    Every tensor but the weights of the base's linear layers is shared; those stay in `module`, on the CPU,
    so that its checkpoint has the digests of the real base.
    """
    bitsandbytes = require("bitsandbytes", extra="qlora")
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    twin = copy.deepcopy(module, shared)
    adapted = {id(layer) for _, _, layer in adapted_layers(twin)}
    for parent in list(twin.base.modules()):  # type: ignore[union-attr]
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and not child.weight.requires_grad:
                setattr(parent, name, _four_bits(bitsandbytes, child))
    assert adapted, "a module without adapters has nothing to train in its base"
    return twin


def _four_bits(bitsandbytes: object, linear: nn.Linear) -> nn.Module:
    """The layer in NF4; its weights are quantized when it is moved to its device."""
    nn4 = bitsandbytes.nn  # type: ignore[attr-defined]
    layer = nn4.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=None,
        compress_statistics=True,
        quant_type="nf4",
    )
    layer.weight = nn4.Params4bit(linear.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4")
    layer.bias = linear.bias
    layer.to(linear.weight.device)
    return layer
