"""What language models are quantized on, how many weights share a scale, what a CPU cannot run."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from export.calibration_texts import CalibrationTexts, read_texts
from export.quantization.language_model import group_size, pinning_left_out
from export.source import Source
from export.targets.vllm import CPU_BITS, CPU_HEADS, CPU_MULTIPLE, why_not_on_cpu, why_nowhere
from runtimes.errors import InputError, MissingPackage
from runtimes.host.gpu import gpu
from runtimes.vllm.server import find_python
from training.checkpoint import Checkpoint
from training.language_model import LanguageModel
from training.spec import find_spec

# Prints what vLLM's own code accepts on a CPU.
LIMITS_PROGRAM = """
import json, torch
from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel
from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearLayerConfig
from vllm.scalar_type import scalar_types
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

def runs(kind, *sizes):
    config = MPLinearLayerConfig(sizes, sizes, kind, torch.bfloat16, 32, False, False)
    return CPUWNA16LinearKernel.can_implement(config)[0]

symmetric = {3: scalar_types.uint3b4, 4: scalar_types.uint4b8, 8: scalar_types.uint8b128}
print(json.dumps({
    "bits": [bits for bits, kind in symmetric.items() if runs(kind, 64, 64)],
    "with_zero_points": runs(scalar_types.uint4, 64, 64),
    "inputs": [size for size in range(16, 161, 16) if runs(scalar_types.uint4, size, 64)],
    "outputs": [size for size in range(16, 161, 16) if runs(scalar_types.uint4, 64, size)],
    "heads": CPUAttentionBackend.get_supported_head_sizes(),
}))
"""


def language_model(name: str, checkpoints: Path) -> LanguageModel:
    spec = find_spec(name)
    return Source(spec, Checkpoint.load(checkpoints / spec.checkpoint)).language_model


def test_blank_lines_separate_documents(tmp_path: Path) -> None:
    (tmp_path / "texts.te").write_text("one\nstill one\n\n\ntwo\n")
    assert list(read_texts(tmp_path / "texts.te")) == ["one\nstill one", "two"]


def test_a_generator_reads_texts_in_a_line_and_an_embedder_one_by_one(checkpoints: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("\n\n".join(["abc"] * 8))  # four tokens each, with the one that begins a text
    texts = CalibrationTexts(file=tmp_path / "texts.txt", samples=3, tokens=6)
    line = texts.rows(language_model("hallucination_generator", checkpoints))
    assert [len(row) for row in line] == [6, 6, 2]
    single = texts.rows(language_model("statements", checkpoints))
    assert len(single) == 3
    assert len({tuple(row) for row in single}) == 1


def llama(**changes: int) -> LlamaForCausalLM:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=1, **{**sizes, **changes}))


@pytest.mark.parametrize(("width", "size"), [(256, 128), (64, 64), (96, 32)])
def test_a_group_divides_every_width(width: int, size: int) -> None:
    assert group_size(llama(hidden_size=width, intermediate_size=384)) == size


def test_widths_that_no_group_divides_are_refused() -> None:
    with pytest.raises(InputError, match=r"divisible by 32, found model.layers.0.mlp.down_proj of 80"):
        group_size(llama(intermediate_size=80))


@pytest.mark.parametrize(
    ("changes", "precision", "reason"),
    [
        ({}, "w4a16_awq", None),
        ({}, "w8a8_gptq", None),
        ({}, "bf16", None),
        ({}, "w3a16_gptq", "runs weights of 4 bits beside activations of 16, not of 3"),
        ({}, "w8a16_gptq", "runs weights of 4 bits beside activations of 16, not of 8"),
        ({"num_attention_heads": 4, "num_key_value_heads": 4}, "bf16", "has no attention for heads of 16"),
        (
            {"intermediate_size": 80},
            "w4a16_awq",
            "needs sizes in multiples of 32, found model.layers.0.mlp.gate_proj of 64 x 80",
        ),
    ],
)
def test_models_that_vllm_refuses_on_a_cpu_are_found_before_it_starts(
    changes: dict[str, int], precision: str, reason: str | None
) -> None:
    assert why_not_on_cpu(llama(**changes), precision) == (reason and f"built, not run: vLLM on a CPU {reason}")


@pytest.mark.parametrize(
    ("kind", "width", "refused"), [("qwen2", 32, True), ("qwen2", 16, False), ("llama", 32, False)]
)
def test_heads_of_a_width_that_vllm_misreads_are_refused(kind: str, width: int, refused: bool) -> None:
    config = AutoConfig.for_model(kind, hidden_size=64, num_attention_heads=4, head_dim=width)
    reason = "built, not run: expected heads of width 16, as vLLM has for qwen2, found 32"
    assert why_nowhere(config) == (reason if refused else None)


@pytest.mark.vllm
@pytest.mark.skipif(gpu() is not None, reason="vLLM for a GPU has no kernels for a CPU")
def test_the_limits_of_vllm_on_a_cpu_are_those_in_its_own_code() -> None:
    try:
        python = find_python()
    except MissingPackage as error:
        pytest.skip(str(error))
    asked = subprocess.run([python, "-c", LIMITS_PROGRAM], capture_output=True, text=True, check=False)
    assert asked.returncode == 0, asked.stderr[-2000:]
    sizes = [size for size in range(16, 161, 16) if size % CPU_MULTIPLE == 0]
    expected = {
        "bits": [CPU_BITS],
        "with_zero_points": True,
        "inputs": sizes,
        "outputs": sizes,
        "heads": list(CPU_HEADS),
    }
    assert json.loads(asked.stdout.splitlines()[-1]) == expected


@pytest.mark.skipif(torch.accelerator.is_available(), reason="with an accelerator, memory can be pinned")
def test_llmcompressor_still_pins_memory_where_there_is_no_accelerator() -> None:
    """If this fails, `pinning_left_out` has had its day: take it out."""
    cache = pytest.importorskip("llmcompressor.pipelines.cache")
    kept = cache.IntermediatesCache([{"states": cache.IntermediateValue(torch.ones(2), None)}])
    with pytest.raises(RuntimeError, match="Cannot access accelerator device"):
        kept.pin_memory(0)
    with pinning_left_out():
        kept.pin_memory(0)
    with pytest.raises(RuntimeError, match="Cannot access accelerator device"):
        kept.pin_memory(0)
