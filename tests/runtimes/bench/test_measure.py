"""Workers: engines in processes that may die, in other environments, and their calls."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from runtimes.bench import measure, wire
from runtimes.bench.measure import Worker, interpreter
from runtimes.bench.worker import WARMUP_CALLS, WARMUP_S, check_device, example_inputs, prepare
from runtimes.errors import EngineError
from runtimes.host.gpu import gpu
from runtimes.repository import find
from runtimes.runtime import open_runtime
from tests.toys import gone

STEP, WINDOW = {"batch": 1, "time": 1}, {"batch": 8, "time": 30}


@pytest.fixture(scope="module")
def root(gru_repository: Path) -> Path:
    return find(gru_repository, "policy_gru_onnx")


@pytest.fixture
def worker(root: Path) -> Iterator[Worker]:
    worker = Worker(root, {})
    yield worker
    worker.close()


# What is called ------------------------------------------------------------------------------------------------------


def test_the_example_is_repeated_to_the_sizes(root: Path) -> None:
    with open_runtime(root) as runtime:
        for sizes in (STEP, WINDOW, {"batch": 3, "time": 31}):
            frames = example_inputs(runtime, sizes)["frames"]
            assert frames.shape[:2] == (sizes["batch"], sizes["time"])
            runtime.fresh({"frames": frames})
        one = example_inputs(runtime, {"batch": 1, "time": 2})["frames"]
        np.testing.assert_array_equal(
            example_inputs(runtime, {"batch": 3, "time": 4})["frames"], np.tile(one, (3, 2, 1))
        )


def test_a_call_at_time_one_is_the_next_step_and_a_window_begins_anew(root: Path) -> None:
    with open_runtime(root) as runtime:
        step, window = prepare(runtime, STEP), prepare(runtime, WINDOW)
        assert not np.array_equal(step()["main_x"], step()["main_x"])
        np.testing.assert_array_equal(window()["main_x"], window()["main_x"])


# Processes -----------------------------------------------------------------------------------------------------------


CLOSED = wire.closed_loop(0.02)


def test_a_worker_measures_window_by_window(worker: Worker) -> None:
    found = worker.prepare(STEP)
    long, short = worker.window(CLOSED), worker.window({**CLOSED, "seconds": 0.0})
    assert (found.engine, found.provider, dict(found.sizes)) == ("onnxruntime", "CPUExecutionProvider", STEP)
    assert len(long.samples_s) > 1
    assert len(short.samples_s) == 1, "a window has one sample at least"
    assert all(sample > 0 for sample in long.samples_s)
    assert sum(long.samples_s) <= long.wall_s
    assert long.cpu_s > 0
    assert long.device_s == []
    assert found.load_s > 0
    assert found.first_call_s > 0
    assert found.warmup_s >= WARMUP_S
    assert found.warmup_calls >= WARMUP_CALLS


def test_a_worker_applies_every_kind_of_load(worker: Worker) -> None:
    worker.prepare(STEP)
    together = worker.window(wire.concurrent(3, 0.0))
    assert len(together.samples_s) == 3
    arrived = worker.window(wire.open_loop(500.0, 0.05, [0, 0]))
    again = worker.window(wire.open_loop(500.0, 0.05, [0, 0]))
    assert len(arrived.samples_s) == len(again.samples_s) == len(arrived.service_s) > 5


def test_one_process_is_measured_at_several_sizes(worker: Worker) -> None:
    assert dict(worker.prepare(STEP).sizes) == STEP
    assert dict(worker.prepare(WINDOW).sizes) == WINDOW
    assert worker.window(CLOSED).samples_s


def test_a_closed_worker_leaves_no_process(root: Path) -> None:
    worker = Worker(root, {})
    assert not gone(worker.pid)
    worker.close()
    assert gone(worker.pid)
    worker.close()


def test_an_engine_that_cannot_open_is_an_error_with_the_reason(root: Path, started_pids: list[int]) -> None:
    with pytest.raises(EngineError, match="engine onnxruntime: expected a device of cpu, cuda here, found 'tpu'"):
        Worker(root, {"device": "tpu"})
    assert len(started_pids) == 1
    assert gone(started_pids[0])


@pytest.mark.skipif(gpu() is not None, reason="there is a GPU")
def test_onnx_runtime_without_a_gpu_does_not_fall_back_to_the_cpu(
    root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(EngineError, match="expected CUDAExecutionProvider, it fell back to CPUExecutionProvider"):
        open_runtime(root, device="cuda").open()
    assert capfd.readouterr().out == ""


def test_sizes_that_an_artifact_does_not_have_are_named(worker: Worker) -> None:
    with pytest.raises(EngineError, match=r"time 1\.\.512"):
        worker.prepare({"batch": 1, "time": 513})
    assert gone(worker.pid)


def test_a_worker_killed_while_it_opens_is_one_line_and_no_zombie(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    popen, killed = subprocess.Popen, []

    def start_and_kill(*arguments: Any, **options: Any) -> Any:
        process = popen(*arguments, **options)
        os.kill(process.pid, signal.SIGKILL)
        killed.append(process.pid)
        return process

    monkeypatch.setattr(measure.subprocess, "Popen", start_and_kill)
    with pytest.raises(EngineError, match="the engine's process died with status -9"):
        Worker(root, {})
    assert gone(killed[0])


@pytest.mark.parametrize("wait", [True, False])
def test_a_worker_killed_between_windows_or_within_one_is_one_line_and_no_zombie(worker: Worker, wait: bool) -> None:
    worker.prepare(STEP)
    os.kill(worker.pid, signal.SIGKILL)
    if wait:
        worker._process.wait()
    with pytest.raises(EngineError, match="the engine's process died with status -9"):
        worker.window({**CLOSED, "seconds": 30.0})
    assert gone(worker.pid)


def test_a_worker_that_answers_too_late_is_ended(
    root: Path, started_pids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "START_TIMEOUT_S", 0.01)
    with pytest.raises(EngineError, match=r"expected an answer within 0\.01 s, found none"):
        Worker(root, {})
    assert gone(started_pids[0])


def test_an_engine_without_its_environment_is_an_error_with_its_path(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = SimpleNamespace(environment=".venv-nowhere")
    monkeypatch.setattr(measure.plugins, "load", lambda *_: engine)
    with pytest.raises(EngineError, match=r"expected its environment in .*\.venv-nowhere, found none"):
        interpreter("elsewhere")


def test_an_engine_on_a_gpu_that_reports_another_device_is_an_error() -> None:
    def runtime(device: str, provider: str, remote: bool = False) -> Any:
        return SimpleNamespace(device=device, provider=provider, remote=remote, artifact=SimpleNamespace(name="toy"))

    check_device(runtime("cpu", "CPUExecutionProvider"))
    check_device(runtime("cuda", "torch eager on cuda"))
    check_device(runtime("cuda", "triton 2.51 on cpu or not", remote=True))
    with pytest.raises(EngineError, match="toy: expected an engine on cuda, found CPUExecutionProvider"):
        check_device(runtime("cuda", "CPUExecutionProvider"))
