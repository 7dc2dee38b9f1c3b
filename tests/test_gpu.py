"""What needs an NVIDIA GPU: torch eager and compiled in every precision, the Mamba kernel, ONNX Runtime on CUDA."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from export import all as export_all
from export import parity
from export.convert import Cell, convert, verify_artifact
from export.source import Source
from export.target import Built
from runtimes import plugins
from runtimes.artifact import Artifact
from runtimes.bench import __main__ as bench
from runtimes.host.gpu import gpu
from runtimes.runtime import open_runtime
from training.checkpoint import Checkpoint
from training.layers.scan import Form, scan_form, selective_scan
from training.spec import all_specs, find_spec

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(gpu() is None, reason="no NVIDIA GPU here")]
POLICIES = [name for name in sorted(all_specs()) if name.startswith("policy_")]


def made(model: str, target: str, precision: str, checkpoints: Path, out: Path) -> tuple[Artifact, Source, Built]:
    cell = Cell(spec=find_spec(model), target=plugins.load("export.targets", target, "TARGET"), precision=precision)
    source = Source(cell.spec, Checkpoint.load(checkpoints / model))
    artifact, built = convert(cell, source, "unpublished", out)
    return artifact, source, built


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("model", POLICIES)
def test_torch_on_cuda_says_what_the_original_says(
    model: str, precision: str, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    _, source, _ = made(model, "torch", precision, checkpoints, tmp_path)
    with open_runtime(tmp_path, device="cuda") as runtime:
        parity.require_passed(parity.check_parity(runtime, source, precision))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", POLICIES)
def test_a_compiled_step_on_cuda_says_what_the_original_says(
    model: str, precision: str, checkpoints: Path, tmp_path: Path
) -> None:
    _, source, _ = made(model, "torch", precision, checkpoints, tmp_path)
    inputs = source.draw_inputs(np.random.default_rng(0), {"batch": 4, "time": 1})
    with open_runtime(tmp_path, device="cuda", compiled=True) as runtime:
        got = runtime.fresh(inputs)
    parity.require_passed(parity.compare(source, got, source.answer(inputs), source.spec.parity.tolerance[precision]))


@pytest.mark.parametrize("model", POLICIES)
def test_onnx_runtime_on_cuda_says_what_the_original_says(model: str, checkpoints: Path, tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("this onnxruntime has no CUDA")
    _, source, _ = made(model, "onnx", "fp32", checkpoints, tmp_path)
    with open_runtime(tmp_path, device="cuda") as runtime:
        parity.require_passed(parity.check_parity(runtime, source, "fp16"))  # CUDA's own products are TF32


@pytest.mark.parametrize("model", POLICIES)
def test_a_tensorrt_engine_runs_where_the_gpu_takes_it(model: str, checkpoints: Path, tmp_path: Path) -> None:
    artifact, source, built = made(model, "tensorrt", "fp32", checkpoints, tmp_path)
    if built.not_run_reason:
        pytest.skip(built.not_run_reason)
    assert verify_artifact(artifact, source, tmp_path, built).verified


def test_a_benchmark_on_cuda_has_times_of_the_device_and_memory_of_the_gpu(
    checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repository = tmp_path / "model_repository"
    places = ["--checkpoints", str(checkpoints), "--repository", str(repository)]
    assert export_all.main(["--target", "torch", "--target", "openvino", "--model", "policy_gru", *places]) == 0
    capsys.readouterr()
    assert bench.main(["--repository", str(repository), "--device", "cuda", "--rounds", "3", "--json"]) == 0
    for row in json.loads(capsys.readouterr().out)["rows"]:
        if row["engine"] == "openvino":
            assert (row["device"], row["device_p50_s"], row["gpu_memory_bytes"]) == ("cpu", None, None)
            continue
        assert row["device"] == "cuda"
        assert 0 < row["device_p50_s"] <= row["p50_s"]
        assert row["gpu_memory_bytes"] is None or row["gpu_memory_bytes"] > 1_000_000  # None in some containers
        assert "cuda" in row["provider"]


def test_the_mamba_kernel_continues_a_state() -> None:
    pytest.importorskip("mamba_ssm")
    torch.manual_seed(0)
    batch, time, inner, size = 2, 50, 32, 16
    x, step = torch.randn(batch, time, inner).cuda(), torch.rand(batch, time, inner).cuda() * 0.1
    decay = -torch.rand(inner, size).cuda()
    into, out = torch.randn(batch, time, size).cuda(), torch.randn(batch, time, size).cuda()
    state = torch.randn(batch, inner, size).cuda()
    answers = []
    for kind in ("loop", "kernel"):
        with scan_form(Form(kind=kind)):  # type: ignore[arg-type]
            answers.append(selective_scan(x, step, decay, into, out, state))
    for loop, kernel in zip(*answers, strict=True):
        torch.testing.assert_close(loop, kernel, atol=1e-4, rtol=1e-4)
