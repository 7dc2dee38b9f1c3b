"""Weights of three, four and eight bits for language models, by llmcompressor, in the format of compressed-tensors.

AWQ: Lin et al. (2023). GPTQ: Frantar et al. (2022).
"""

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from runtimes.errors import InputError, require
from runtimes.host.output_capture import bars_on_a_terminal_only

if TYPE_CHECKING:
    from torch import nn

EXTRA = "quantize"
GROUP_MAX, GROUP_MIN = 128, 32  # weights that share a scale; vLLM on a CPU needs widths in multiples of 32
OBSERVER = "memoryless_mse"  # clips where that reduces the error of a group; the default never clips
HEAD = "lm_head"  # not quantized, as embeddings and norms are not


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheme:
    """How weights become integers: by AWQ with zero points, by GPTQ without.

    activations  the bits of a layer's input: 16 is unquantized, 8 is quantized token by token; weights then share a
                 scale along a whole row, as the kernels for it need
    """

    method: Literal["awq", "gptq"]
    bits: int
    activations: int = 16

    def describe(self, model: "nn.Module") -> str:
        """For a manifest, such as `AWQ W4A16, groups of 128`."""
        shared = f"groups of {group_size(model)}" if self.activations == 16 else "rows"
        return f"{self.method.upper()} W{self.bits}A{self.activations}, {shared}"


SCHEMES = {
    "w4a16_awq": Scheme(method="awq", bits=4),
    "w4a16_gptq": Scheme(method="gptq", bits=4),
    "w8a16_gptq": Scheme(method="gptq", bits=8),
    "w8a8_gptq": Scheme(method="gptq", bits=8, activations=8),
    "w3a16_gptq": Scheme(method="gptq", bits=3),
}


def quantize(model: Any, tokenizer: Any, texts: Sequence[np.ndarray], scheme: Scheme, folder: Path) -> None:
    """Write the quantized model to `folder` in the format of Hugging Face and vLLM; `model` is changed in place.

    `texts` are token ids, each a row of its own, so that no padding takes part.
    """
    import torch

    with silenced():
        llmcompressor = require("llmcompressor", extra=EXTRA)
        model.config.save_pretrained(folder)
        model.config._name_or_path = str(folder)  # llmcompressor reads the config of a model from a folder
        rows = [{"input_ids": torch.from_numpy(ids)} for ids in texts]
        with pinning_left_out():
            llmcompressor.oneshot(
                model=model,
                tokenizer=tokenizer,
                dataset=torch.utils.data.DataLoader(rows, batch_size=1),  # type: ignore[arg-type]
                num_calibration_samples=len(rows),
                recipe=_recipe(scheme, model),
            )
        model.save_pretrained(folder, save_compressed=True)
    (folder / "recipe.yaml").unlink(missing_ok=True)


def group_size(model: "nn.Module") -> int:
    """The largest power of two from GROUP_MIN to GROUP_MAX that divides every width; `InputError` if there is none.

    vLLM needs a whole number of groups in a row; widths of published models are multiples of 128.
    """
    widths = {name: layer.in_features for name, layer in quantized_layers(model)}
    if not widths:
        raise InputError(f"expected linear layers to quantize, found none in {type(model).__name__}")
    size = GROUP_MAX
    while size >= GROUP_MIN:
        if all(width % size == 0 for width in widths.values()):
            return size
        size //= 2
    name, width = next((name, width) for name, width in widths.items() if width % GROUP_MIN)
    raise InputError(f"expected linear layers of a width divisible by {GROUP_MIN}, found {name} of {width}")


def quantized_layers(model: "nn.Module") -> Iterator[tuple[str, Any]]:
    from torch import nn

    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name != HEAD:
            yield name, layer


def bytes_of_bf16(folder: Path) -> float:
    """The bytes of the quantized layers over what they would be in bfloat16; scales and zero points count."""
    from safetensors.torch import load_file

    small = wide = 0
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for layer in (name.removesuffix("_scale") for name in tensors if name.endswith(".weight_scale")):
            small += sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith(layer))
            shape = tensors.get(f"{layer}_shape")  # of packed weights
            wide += 2 * (tensors[layer].numel() if shape is None else int(shape.prod()))
    if not wide:
        raise InputError(f"{folder}: expected quantized layers, found none")
    return small / wide


@contextmanager
def pinning_left_out() -> Iterator[None]:
    """llmcompressor can run AWQ without an accelerator.

    Its 0.14.0.1 pins the activations it keeps in any case, and torch then raises "Cannot access accelerator device when
    none is available". Pinning only makes copies to a device faster.
    """
    import torch

    cache = require("llmcompressor.pipelines.cache", extra=EXTRA).IntermediatesCache
    if torch.accelerator.is_available():
        yield
        return
    pin_memory, cache.pin_memory = cache.pin_memory, lambda *_, **__: None
    try:
        yield
    finally:
        cache.pin_memory = pin_memory


@contextmanager
def silenced() -> Iterator[None]:
    """llmcompressor logs no step to stdout and looks for no model on a hub; its bars show on a terminal only."""
    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    before = {name: os.environ.get(name) for name in quiet}
    os.environ.update(quiet)
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)  # warns about a name that llmcompressor uses
    try:
        with bars_on_a_terminal_only(), redirect_stdout(sys.stderr):
            require("llmcompressor", extra=EXTRA)  # which turns its log on
            log = require("loguru", extra=EXTRA).logger
            for package in ("llmcompressor", "compressed_tensors"):
                log.disable(package)
            yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _recipe(scheme: Scheme, model: "nn.Module") -> list[Any]:
    quantization = require("compressed_tensors.quantization", extra=EXTRA)
    modifiers = require("llmcompressor.modifiers.quantization", extra=EXTRA)
    integers = {"num_bits": scheme.bits, "type": "int", "symmetric": scheme.method == "gptq", "observer": OBSERVER}
    if scheme.activations == 16:
        weights = quantization.QuantizationArgs(**integers, strategy="group", group_size=group_size(model))
        inputs = None
    else:
        weights = quantization.QuantizationArgs(**integers, strategy="channel")
        inputs = quantization.QuantizationArgs(num_bits=scheme.activations, strategy="token", dynamic=True)
    described = quantization.QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
    settings = {"config_groups": {"group_0": described}, "ignore": [HEAD]}
    if scheme.method == "gptq":
        return [modifiers.GPTQModifier(**settings)]
    awq = require("llmcompressor.modifiers.transform.awq", extra=EXTRA)
    return [awq.AWQModifier(), modifiers.QuantizationModifier(**settings)]
