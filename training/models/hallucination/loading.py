"""The frozen decoder while features are read: its precision, its devices, and settings for known machines.

The memory holds the weights, one layer's activations and two distributions over the vocabulary for a block of rows.
"""

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from runtimes.errors import InputError, require
from runtimes.host.machines import MACHINES
from training.config import Config
from training.frozen import freeze, pretrained_model
from training.models.hallucination.decoder import Decoder, layer_outputs
from training.models.hallucination.frozen import decoder_config, load_decoder
from training.random_init import is_random

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# `stored` keeps the form of the weights in their checkpoint: its dtype, or packed by GPTQ or AWQ.
LOADINGS = (*DTYPES, "int8", "nf4", "stored")
BYTES_PER_WEIGHT = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.1, "nf4": 0.6}
SHARE_FOR_WEIGHTS = 0.6  # of a device's memory; the rest is for activations
PROFILES: dict[str, Config] = {name: dict(machine.holding) for name, machine in MACHINES.items()}


def with_profile(training: Config, config: Config, memory_bytes: int | None = None) -> Config:
    """The settings with those of `profile`; `auto` derives them from the available memory, and "" changes nothing.

    The result has the profile "", so that later changes by hand are not overwritten. A profile changes how features are
    read and not their values: it cannot raise the model's own max_tokens.
    """
    name = training["profile"]
    if name == "":
        return training
    if name != "auto" and name not in PROFILES:
        raise InputError(f"--profile: expected one of {', '.join(PROFILES)}, auto; found '{name}'")
    if name == "auto":
        own = _automatic(config, memory_bytes if memory_bytes is not None else _memory_bytes())
    else:
        own = PROFILES[name]
    return {**training, **own, "profile": ""}


def _automatic(config: Config, memory_bytes: int) -> Config:
    """The best precision whose weights fit, and a batch size for the remaining memory."""
    base = decoder_config(config["base"], config["base_revision"])
    weights = _weights(base)
    order = ("fp16", "int8", "nf4") if torch.cuda.is_available() else ("fp32", "bf16", "int8", "nf4")
    fitting = [name for name in order if weights * BYTES_PER_WEIGHT[name] <= SHARE_FOR_WEIGHTS * memory_bytes]
    loading = fitting[0] if fitting else "nf4"
    rest = max(0.0, memory_bytes - weights * BYTES_PER_WEIGHT[loading]) / 2
    per_token = 4 * (8 * base.hidden_size + 2 * base.intermediate_size)  # one layer, float32
    found = {"loading": loading, "padded_size": max(512, int(min(rest / per_token, 1 << 17)))}
    on_gpu = torch.cuda.is_available()
    return {**found, "device_map": "auto" if on_gpu or not fitting else "", "max_memory": ""}


def _weights(base: Any) -> int:
    width, inner, vocabulary = base.hidden_size, base.intermediate_size, base.vocab_size
    keys = base.num_key_value_heads / base.num_attention_heads
    return int(base.num_hidden_layers * (width * width * (2 + 2 * keys) + 3 * width * inner) + 2 * vocabulary * width)


def _memory_bytes() -> int:
    """The free memory of all GPUs together, or of this machine."""
    if torch.cuda.is_available():
        return sum(torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count()))
    return int(require("psutil", extra="train").virtual_memory().available)


def open_decoder(config: Mapping[str, Any], training: Mapping[str, Any]) -> Decoder:
    """The decoder of these settings; `InputError` for an unknown precision or an impossible device map."""
    if training["loading"] not in LOADINGS:
        raise InputError(f"--set loading: expected one of {', '.join(LOADINGS)}; found '{training['loading']}'")
    source, revision = config["base"], config["base_revision"]
    if training["loading"] == "fp32" and not training["device_map"]:
        decoder = Decoder(source, revision)
    else:
        decoder = Decoder(source, revision, _load(source, revision, training))
    if torch.cuda.is_available() and not training["device_map"] and training["device"] != "cpu":
        load_decoder.cache_clear()  # the cached decoder is moved to the GPU, and others need one on the CPU
        decoder = decoder.to(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
    if training["compile"]:
        decoder.run_layer = torch.compile(layer_outputs, dynamic=True)
    if any(map(is_packed, decoder.model.modules())):
        decoder.run_layer = unpacking(decoder.run_layer)
    return decoder


def is_packed(module: Any) -> bool:
    """Whether this module's weights are packed integers of compressed-tensors, as AWQ and GPTQ make them."""
    return hasattr(module, "weight_packed")


def unpacking(run_layer: Callable[..., Any]) -> Callable[..., Any]:
    """`run_layer` with the weights of that one layer unpacked while it runs; all others stay packed.

    transformers unpacks all of them permanently at the first call of the whole model.
    """

    def run(layer: Any, *given: Any) -> Any:
        with unpacked(layer):
            return run_layer(layer, *given)

    return run


@contextmanager
def unpacked(layer: Any) -> Iterator[None]:
    """In this context the layer has its weights unpacked."""
    compressors = require("compressed_tensors.compressors", extra="quantize")
    packed = [module for module in layer.modules() if is_packed(module)]
    kept = [(dict(module._parameters), module.quantization_status) for module in packed]
    try:
        for module in packed:
            compressors.decompress_module(module)
        yield
    finally:
        for module, (parameters, status) in zip(packed, kept, strict=True):
            module._parameters.clear()
            module._parameters.update(parameters)
            module.quantization_status = status


def _load(source: str, revision: str, training: Mapping[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    decoder_config(source, revision)  # raises for an unknown family
    folder = tempfile.TemporaryDirectory(prefix="slipway-")  # one for each model: layers of several have the same names
    options = _options(training, Path(folder.name, "offload"))
    if is_random(source):  # only from_pretrained quantises and spreads a model
        load_decoder(source, revision).save_pretrained(folder.name)
        source = folder.name
    model = pretrained_model(AutoModelForCausalLM, source, revision, **options)
    model.stored_in = folder  # offloaded layers are read from it at every use
    return freeze(model)


def _options(training: Mapping[str, Any], offload: Path) -> dict[str, Any]:
    """The options of from_pretrained; layers that fit on no device go to the folder `offload`."""
    loading = training["loading"]
    options: dict[str, Any] = {"dtype": DTYPES.get(loading, "auto")}
    if loading in ("int8", "nf4"):
        require("bitsandbytes", extra="hallucination")
        from transformers import BitsAndBytesConfig

        compute = torch.float16 if torch.cuda.is_available() else torch.float32
        options["dtype"] = compute
        options["quantization_config"] = (
            BitsAndBytesConfig(load_in_8bit=True)
            if loading == "int8"
            else BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=compute,
            )
        )
    if training["device_map"]:
        options["device_map"] = training["device_map"]
        options["offload_folder"] = str(offload)
        if training["max_memory"]:
            options["max_memory"] = max_memory(training["max_memory"])
    return options


def max_memory(text: str) -> dict[int | str, str]:
    """`0:12GiB cpu:20GiB` as accelerate takes it."""
    result: dict[int | str, str] = {}
    for pair in text.split():
        device, colon, limit = pair.partition(":")
        if not colon or not limit or not (device == "cpu" or device.isdecimal()):
            raise InputError(f"--set max_memory: expected pairs such as '0:12GiB cpu:20GiB', found '{text}'")
        result[int(device) if device.isdecimal() else device] = limit
    return result
