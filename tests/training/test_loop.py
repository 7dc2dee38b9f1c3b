"""The training loop of all models: its settings, its processes, and its files."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import training
from training import run
from training.checkpoint import Checkpoint
from training.loop import trapezoid


@pytest.mark.slow
def test_two_processes_train_one_model_and_one_of_them_writes_it(tmp_path: Path) -> None:
    arguments = ["policy_gru", "--games", "4", "--frames", "600", "--epochs", "1", "--device", "cpu"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "training.run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(training.__file__).parents[1])}
    done = subprocess.run(
        [*launcher, *arguments, "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("windowed_main_x_nats") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["policy_gru"]
    assert Checkpoint.load(tmp_path / "policy_gru").step > 0


def test_gradient_checkpointing_and_worker_processes_change_no_result(tmp_path: Path) -> None:
    weights = []
    for name, more in (("plain", []), ("other", ["--gradient-checkpointing", "true", "--workers", "1"])):
        arguments = ["policy_gru", "--games", "3", "--frames", "300", "--epochs", "1", *more]
        assert run.main([*arguments, "--out", str(tmp_path / name)]) == 0
        weights.append(load_file(tmp_path / name / "policy_gru" / "weights.safetensors"))
    for parameter in weights[0]:
        np.testing.assert_allclose(weights[0][parameter], weights[1][parameter], atol=1e-6)


def test_bf16_trains_where_there_is_no_accelerator(tmp_path: Path) -> None:
    arguments = ["policy_gru", "--games", "3", "--frames", "300", "--epochs", "1", "--precision", "bf16"]
    assert run.main([*arguments, "--out", str(tmp_path)]) == 0


@pytest.mark.parametrize(
    ("setting", "named"),
    [("scheduler=none", "cosine"), ("precision=fp8", "bf16"), ("device=tpu", "cpu"), ("workers=-1", "0 or more")],
)
def test_a_common_setting_that_cannot_be_is_refused(
    setting: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["policy_gru", "--games", "3", "--frames", "300", "--set", setting, "--out", str(tmp_path)]
    assert run.main(arguments) == 2
    assert named in capsys.readouterr().err.splitlines()[-1]


def test_a_trapezoid_rises_stays_and_falls_and_is_never_zero() -> None:
    shares = [trapezoid(step, warmup=10, steps=100) for step in range(100)]
    assert min(shares) > 0
    assert shares[:11] == sorted(shares[:11])
    assert set(shares[10:91]) == {1.0}
    assert shares[90:] == [pytest.approx((100 - step) / 10) for step in range(90, 100)]
