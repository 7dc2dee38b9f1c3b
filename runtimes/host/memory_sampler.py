"""Samples the memory of process trees in a child process of `Sampler`: python -m runtimes.host.memory_sampler"""

import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtimes.errors import EngineError
from runtimes.host.nvml import nvml

PERIOD_S = 0.02
ANSWER_TIMEOUT_S = 10
GONE = (FileNotFoundError, ProcessLookupError)


@dataclass(kw_only=True, slots=True)
class Peak:
    """The most memory that a process and its descendants held together, in bytes.

    On the GPU it is None unless the driver reports it: not without a GPU, nor in a container whose process ids differ
    from those of the driver.
    """

    memory_bytes: int = 0
    gpu_memory_bytes: int | None = None

    def keep(self, pids: list[int], gpu_bytes: Mapping[int, int | None]) -> None:
        resident = [_resident_bytes(pid, lone=len(pids) == 1) for pid in pids]
        self.memory_bytes = max(self.memory_bytes, sum(resident))
        held = [gpu_bytes[pid] for pid in pids if pid in gpu_bytes]
        known = [each for each in held if each is not None]
        if known and len(known) == len(held):
            self.gpu_memory_bytes = max(self.gpu_memory_bytes or 0, sum(known))


class Sampler:
    """A context manager around the sampling process. `watch` begins with a peak of nothing; `peak` reads it."""

    def __enter__(self) -> "Sampler":
        self._process = subprocess.Popen(
            [sys.executable, "-m", "runtimes.host.memory_sampler"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def watch(self, pid: int) -> None:
        self._request({"watch": pid})

    def peak(self, pid: int) -> Peak:
        """The peak since `watch`, this moment included; the process is watched on."""
        return Peak(**self._request({"peak": pid}))

    def forget(self, pid: int) -> None:
        self._request({"forget": pid})

    def _request(self, message: dict[str, int]) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            print(json.dumps(message), file=stdin, flush=True)
            ready, _, _ = select.select([stdout], [], [], ANSWER_TIMEOUT_S)
            line = stdout.readline() if ready else ""
        except BrokenPipeError:
            line = ""
        if not line:
            raise EngineError("expected an answer of the memory sampler, found none; run the benchmark again")
        answer: dict[str, Any] = json.loads(line)
        return answer


def tree(pid: int) -> Iterator[int]:
    """The process and its descendants, without those that have just ended."""
    yield pid
    try:
        threads = os.listdir(f"/proc/{pid}/task")
        children = [child for t in threads for child in Path(f"/proc/{pid}/task/{t}/children").read_text().split()]
    except GONE:
        return
    for child in children:
        yield from tree(int(child))


def _resident_bytes(pid: int, lone: bool) -> int:
    """The resident bytes now; of a process without children the peak, which the kernel keeps between samples."""
    wanted = "VmHWM:" if lone else "VmRSS:"
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except GONE:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(wanted)), 0)


def main() -> None:
    """Sample until standard input ends; a line is a request to watch or forget a process, or for its peak."""
    peaks: dict[int, Peak] = {}
    while True:
        ready, _, _ = select.select([sys.stdin], [], [], PERIOD_S if peaks else None)
        if ready:
            if not (line := sys.stdin.readline()):
                return
            [(request, pid)] = json.loads(line).items()
            _sample(peaks)
            if request == "watch":
                peaks[pid] = Peak()
            found = peaks.get(pid, Peak())
            if request == "forget":
                peaks.pop(pid, None)
            answer = {"memory_bytes": found.memory_bytes, "gpu_memory_bytes": found.gpu_memory_bytes}
            print(json.dumps(answer), flush=True)
        else:
            _sample(peaks)


def _sample(peaks: dict[int, Peak]) -> None:
    library = nvml()
    gpu_bytes = library.process_bytes() if library and peaks else {}
    for pid, peak in peaks.items():
        peak.keep(list(tree(pid)), gpu_bytes)


if __name__ == "__main__":
    main()
