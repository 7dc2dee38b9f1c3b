"""Memory of process trees, sampled from outside."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from runtimes.sampler import Sampler, tree
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
    assert sampler.peak(large.pid).gpu_memory_bytes is None or sampler.peak(large.pid).gpu_memory_bytes == 0
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
