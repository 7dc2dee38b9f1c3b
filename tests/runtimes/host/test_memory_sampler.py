"""Memory of process trees, sampled by another process; queries of a GPU, with a fake library."""

import os
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
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


class NvmlError(Exception):
    """What pynvml raises for a status other than success."""


class Library:
    """pynvml for one GPU: a process of 3 GB, one of unknown memory, no MIG. A function it does not have is an error."""

    NVMLError = NvmlError
    NVML_CLOCK_GRAPHICS, NVML_CLOCK_SM, NVML_CLOCK_MEM = 0, 1, 2

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        if index != 0:
            raise NvmlError("Invalid Argument")
        return "GPU 0"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != "GPU-5ab3":
            raise NvmlError("Not Found")
        return "GPU of this UUID"

    def nvmlDeviceGetComputeRunningProcesses(self, device: object) -> list[Any]:
        return [SimpleNamespace(pid=42, usedGpuMemory=3_000_000_000), SimpleNamespace(pid=43, usedGpuMemory=None)]

    def nvmlSystemGetDriverVersion(self) -> str:
        return "570.1"

    def nvmlDeviceGetClockInfo(self, device: object, kind: int) -> int:
        return (1300, 1410, 1593)[kind]

    def nvmlDeviceGetEnforcedPowerLimit(self, device: object) -> int:
        return 700_000

    def nvmlDeviceGetMigMode(self, device: object) -> list[int]:
        raise NvmlError("Not Supported")


def test_a_value_that_the_driver_does_not_give_is_none() -> None:
    """MIG is refused, and this library has no function for the reasons of lower clocks."""
    found = nvml.Nvml(Library(), "GPU 0")
    assert found.process_bytes() == {42: 3_000_000_000, 43: None}
    assert found.state() == {
        "driver": "570.1",
        "graphics_mhz": 1300,
        "sm_mhz": 1410,
        "memory_mhz": 1593,
        "power_limit_mw": 700_000,
        "throttle_reasons": None,
        "mig": None,
    }


def test_mig_and_reasons_are_given_where_the_driver_has_them() -> None:
    library = Library()
    library.nvmlDeviceGetMigMode = lambda device: [1, 0]  # type: ignore[method-assign]
    library.nvmlDeviceGetCurrentClocksThrottleReasons = lambda device: 4  # type: ignore[attr-defined]
    state = nvml.Nvml(library, "GPU 0").state()
    assert (state["mig"], state["throttle_reasons"]) == (1, 4)


def test_processes_are_unknown_where_the_driver_refuses_them() -> None:
    library = Library()

    def refuse(device: object) -> list[Any]:
        raise NvmlError("Function Not Found")

    library.nvmlDeviceGetComputeRunningProcesses = refuse  # type: ignore[method-assign]
    assert nvml.Nvml(library, "GPU 0").process_bytes() == {}


@pytest.mark.parametrize(
    ("visible", "device"),
    [
        (None, "GPU 0"),
        ("0", "GPU 0"),
        ("0,3", "GPU 0"),
        ("GPU-5ab3,0", "GPU of this UUID"),
        ("", None),
        ("-1", None),
        ("7", None),
        ("GPU-none", None),
    ],
)
def test_the_gpu_is_the_first_visible_one(visible: str | None, device: str | None) -> None:
    found = nvml.open_nvml(Library(), visible)
    assert (found.device if found else None) == device


def test_a_missing_driver_or_package_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library()

    def refuse() -> None:
        raise NvmlError("NVML Shared Library Not Found")

    library.nvmlInit = refuse  # type: ignore[method-assign]
    assert nvml.open_nvml(library, None) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)  # an import of it fails
    assert nvml.nvml.__wrapped__() is None


@pytest.mark.skipif(gpu() is not None, reason="there is a GPU")
def test_the_functions_are_those_of_the_installed_library() -> None:
    """Each name that is asked for exists in nvidia-ml-py; without a driver each raises its NVMLError."""
    pynvml = pytest.importorskip("pynvml")
    asked: list[str] = []

    class Recorded:
        def __getattr__(self, name: str) -> Any:
            asked.append(name)
            return getattr(pynvml, name)

    found = nvml.Nvml(Recorded(), None)
    assert found.process_bytes() == {}
    assert set(found.state().values()) == {None}
    assert [name for name in asked if not hasattr(pynvml, name)] == []


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
