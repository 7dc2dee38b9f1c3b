"""Checkpoints that vLLM serves, quantized by AWQ or GPTQ, with the entry that Triton's vllm backend reads."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.hugging_face import store_as, write_embedding_modules, write_tokenizer
from export.quantization.language_model import SCHEMES, bytes_of_bf16, quantize, quantized_layers
from export.source import Source
from export.target import Built, Target
from runtimes.artifact import Check, write_json
from runtimes.errors import MissingPackage
from runtimes.host.gpu import gpu
from runtimes.host.output_capture import bars_on_a_terminal_only
from runtimes.vllm.artifact import CHECKPOINT, ENGINE_FILE, TASK, TOKENIZER
from runtimes.vllm.server import find_python

if TYPE_CHECKING:
    from training.language_model import LanguageModel
    from training.spec import ModelSpec

BYTES_MAX = {3: 0.30, 4: 0.35, 8: 0.60}  # of bfloat16, by bits: numbers, scales and zero points
# What vLLM 0.32 supports on a CPU, by its kernels/linear/mixed_precision/cpu.py and attention/backends/cpu_attn.py.
CPU_BITS, CPU_MULTIPLE = 4, 32
CPU_HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


def refuse(spec: "ModelSpec") -> str | None:
    return None if spec.export.language_model else "not a decoder language model"


def convert(source: Source, precision: str, out: Path) -> Built:
    """Write the checkpoint and model.json. fp32 and bf16 keep the weights; else the linear layers are quantized.

    Layers that are not quantized, such as embeddings and norms, are bfloat16, the type in which vLLM computes.
    """
    import torch

    language_model = source.language_model
    folder, scheme = out / CHECKPOINT, SCHEMES.get(precision)
    folder.mkdir()
    # Quantizing changes both; parity and other precisions need the original.
    model, tokenizer = copy.deepcopy(language_model.model), copy.deepcopy(language_model.tokenizer)
    built_with: dict[str, str] = {TASK: language_model.task}
    checks: dict[str, Check] = {}
    if scheme:
        texts = source.texts.rows(language_model)
        quantize(model, tokenizer, texts, scheme, folder)
        built_with["scheme"] = f"{scheme.describe(model)}, from {sum(map(len, texts))} tokens in {len(texts)} texts"
        checks["bytes_of_bf16"] = Check(value=bytes_of_bf16(folder), limit=BYTES_MAX[scheme.bits])
    else:
        with bars_on_a_terminal_only():
            model.save_pretrained(folder)
    if precision != "fp32":
        store_as(folder, torch.bfloat16)
    for place in (folder, out / TOKENIZER):
        write_tokenizer(language_model, place)
    if language_model.task == "embed":
        write_embedding_modules(language_model, folder)
    write_json(out / ENGINE_FILE, engine_arguments(language_model, precision))
    return Built(
        built_with=built_with,
        checks=checks,
        device="cuda" if gpu() else "cpu",
        not_run_reason=not_run_reason(language_model.model, precision),
        proxy_engine="transformers",
    )


def engine_arguments(language_model: "LanguageModel", precision: str) -> dict[str, Any]:
    """The arguments of AsyncEngineArgs; `model` and `tokenizer` become absolute paths when they are published."""
    arguments = {
        "model": CHECKPOINT,
        "tokenizer": TOKENIZER,
        "dtype": "float32" if precision == "fp32" else "bfloat16",  # its default rounds float32 on a CPU
        "max_model_len": language_model.window,
    }
    return {**arguments, "runner": "pooling"} if language_model.task == "embed" else arguments


def not_run_reason(model: Any, precision: str) -> str | None:
    """Why vLLM does not run this model on this machine, or None."""
    try:
        find_python()
    except MissingPackage as error:
        return f"built, not run: {error}"
    return why_nowhere(model.config) or (None if gpu() else why_not_on_cpu(model, precision))


def why_nowhere(config: Any) -> str | None:
    """Why vLLM reads this model wrongly on any device, or None."""
    usual = config.hidden_size // config.num_attention_heads  # the only width in its models/qwen2.py
    width = getattr(config, "head_dim", None) or usual
    if config.model_type == "qwen2" and width != usual:
        return f"built, not run: expected heads of width {usual}, as vLLM has for qwen2, found {width}"
    return None


def why_not_on_cpu(model: Any, precision: str) -> str | None:
    """Why vLLM refuses this model on a CPU, or None; vLLM itself reports it after half a minute."""
    scheme, config = SCHEMES.get(precision), model.config
    heads = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if heads not in CPU_HEADS:
        return f"built, not run: vLLM on a CPU has no attention for heads of {heads}"
    if scheme is None or scheme.activations < 16:
        return None
    if scheme.bits != CPU_BITS:
        return f"built, not run: vLLM on a CPU runs weights of 4 bits beside activations of 16, not of {scheme.bits}"
    for name, layer in quantized_layers(model):
        if layer.in_features % CPU_MULTIPLE or layer.out_features % CPU_MULTIPLE:
            sizes = f"{layer.in_features} x {layer.out_features}"
            return f"built, not run: vLLM on a CPU needs sizes in multiples of {CPU_MULTIPLE}, found {name} of {sizes}"
    return None


TARGET = Target(
    name="vllm",
    runtime="vllm",
    precisions=("w4a16_awq", "w4a16_gptq", "w8a16_gptq", "w8a8_gptq", "w3a16_gptq", "bf16", "fp32"),
    packages=("torch", "transformers", "llmcompressor", "compressed-tensors"),
    convert=convert,
    refuse=refuse,
    reads_texts=True,
)
