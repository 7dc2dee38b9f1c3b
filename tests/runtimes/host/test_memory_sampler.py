"""Memory of process trees, sampled from outside; what a GPU is asked, as far as that shows without one."""

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from runtimes.bench import cuda_timer
from runtimes.bench.cuda_timer import DeviceTimer
from runtimes.errors import EngineError
from runtimes.host import nvml
from runtimes.host.gpu import gpu
from runtimes.host.memory_sampler import Peak, Sampler, tree
from tests.toys import gone, wait_for

HOLD = "import sys; held = b'1' * int(sys.argv[1]); print(len(held), flush=True); sys.stdin.read()"
MB = 1_000_000


@pytest.fixture
def sampler() -> Iterator[Sampler]:
    with Sampler() as sampler:
        yield sampler


def holder(size: int, code: str = HOLD) -> "subprocess.Popen[str]":
    """A process that holds this many bytes until its standard input ends."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", code, str(size)], text=True, **pipes)  # type: ignore[call-overload]
    assert process.stdout.readline()
    return process  # type: ignore[no-any-return]


def test_a_peak_is_what_a_process_held(sampler: Sampler) -> None:
    small, large = holder(MB), holder(200 * MB)
    for process in (small, large):
        sampler.watch(process.pid)
    difference = sampler.peak(large.pid).memory_bytes - sampler.peak(small.pid).memory_bytes
    assert 195 * MB < difference < 205 * MB
    assert sampler.peak(large.pid).gpu_memory_bytes is None, "neither holds anything on a GPU"
    for process in (small, large):
        process.communicate()


def test_what_descendants_hold_counts(sampler: Sampler) -> None:
    parent = "import subprocess, sys; subprocess.run([sys.executable, '-c', " + repr(HOLD) + ", sys.argv[1]])"
    process = holder(200 * MB, parent)
    sampler.watch(process.pid)
    assert sampler.peak(process.pid).memory_bytes > 200 * MB
    assert len(list(tree(process.pid))) == 2
    process.communicate()


def test_a_peak_outlives_the_process_and_is_forgotten_on_request(sampler: Sampler) -> None:
    process = holder(50 * MB)
    sampler.watch(process.pid)
    held = sampler.peak(process.pid).memory_bytes
    process.communicate()
    assert sampler.peak(process.pid).memory_bytes >= held > 50 * MB
    sampler.forget(process.pid)
    assert sampler.peak(process.pid).memory_bytes == 0


def test_the_sampler_ends_with_its_context() -> None:
    with Sampler() as sampler:
        pid = sampler._process.pid
        sampler.watch(os.getpid())
    wait_for(lambda: gone(pid))


# GPU, without one ----------------------------------------------------------------------------------------------------


def test_structures_of_nvml_are_laid_out_as_in_its_header() -> None:
    """nvml.h: nvmlProcessInfo_t is pid, usedGpuMemory, two instance ids."""
    fields = {name: getattr(nvml._Process, name).offset for name, _ in nvml._Process._fields_}
    assert fields == {"pid": 0, "used": 8, "gpu_instance": 16, "compute_instance": 20}
    assert ctypes.sizeof(nvml._Process) == 24


class Library:
    """Answers as NVML would for one GPU with a process of 3 GB and one it does not tell of, and knows no MIG."""

    def nvmlDeviceGetComputeRunningProcesses_v3(self, device: object, count: Any, found: Any) -> int:
        assert count._obj.value == len(found)
        count._obj.value = 2
        found[0].pid, found[0].used = 42, 3_000_000_000
        found[1].pid, found[1].used = 43, 2**64 - 1  # NVML_VALUE_NOT_AVAILABLE
        return 0

    def nvmlSystemGetDriverVersion(self, text: Any, length: int) -> int:
        text.value = b"570.1"
        return 0

    def nvmlDeviceGetMigMode(self, *_: object) -> int:
        return 3  # NVML_ERROR_NOT_SUPPORTED

    def __getattr__(self, name: str) -> Any:
        def ask(device: object, *arguments: Any) -> int:
            arguments[-1]._obj.value = 1410
            return 0

        return ask


def test_what_a_driver_does_not_answer_is_none() -> None:
    found = nvml.Nvml(Library(), ctypes.c_void_p())
    assert found.process_bytes() == {42: 3_000_000_000, 43: None}
    state = found.state()
    assert (state["driver"], state["sm_mhz"], state["mig"]) == ("570.1", 1410, None)


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ([{42: 3 * MB, 43: 2 * MB, 99: 70 * MB}], 5 * MB),
        ([{42: 3 * MB}, {42: 1 * MB}], 3 * MB),
        ([{7: 3 * MB}], None),  # ids of a host, seen from within a container
        ([{}], None),
        ([{42: None}], None),
        ([{42: 3 * MB, 43: None}], None),  # 3 MB would be too little
        ([{}, {42: 3 * MB}], 3 * MB),
        ([{42: 0}], 0),
    ],
)
def test_memory_on_the_gpu_is_known_only_where_the_driver_tells_it(
    told: list[dict[int, int | None]], expected: int | None
) -> None:
    peak = Peak()
    for gpu_bytes in told:
        peak.keep([42, 43], gpu_bytes)
    assert peak.gpu_memory_bytes == expected


@pytest.mark.skipif(gpu() is not None, reason="there is a GPU")
def test_without_a_gpu_there_is_no_library_and_events_are_refused() -> None:
    pytest.importorskip("cuda.bindings.runtime")
    assert nvml.nvml() is None
    with pytest.raises(EngineError, match="CUDA events: expected success"):
        DeviceTimer(0)


def test_events_stand_around_the_call_and_are_read_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order in which the CUDA runtime wants them: record, work, record, wait, read."""
    told: list[str] = []

    class Cuda:
        def __getattr__(self, name: str) -> Any:
            def call(*arguments: object) -> tuple[object, ...]:
                told.append(name)
                return (0, 12.5) if name in ("cudaEventCreate", "cudaEventElapsedTime") else (0,)

            return call

    monkeypatch.setattr(cuda_timer, "require", lambda *_, **__: Cuda())
    timer = DeviceTimer(7)
    assert timer.around(lambda: told.append("work") or "answer")() == "answer"  # type: ignore[func-returns-value]
    assert timer.elapsed_s() == pytest.approx(0.0125)
    assert told[2:] == ["cudaEventRecord", "work", "cudaEventRecord", "cudaEventSynchronize", "cudaEventElapsedTime"]
