"""Measures an engine in a process of its own, window by window, so that the runs of engines can be interleaved."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from runtimes import plugins
from runtimes.artifact import Artifact
from runtimes.bench import wire
from runtimes.bench.load import Window
from runtimes.bench.steady_state import steady_from
from runtimes.errors import EngineError
from runtimes.host.memory_sampler import Peak
from runtimes.tensors import BATCH

CHECKOUT = Path(__file__).parents[2]
WORKERS = ("runtimes.bench.worker", "runtimes.worker")  # the second name is that of checkouts before 0.2
CLOSE_TIMEOUT_S = 2
START_TIMEOUT_S = 600  # torch.compile may take minutes
Sizes = Mapping[str, int]


@dataclass(kw_only=True, slots=True)
class Measurement:
    """The windows of one engine at one size under one kind of load, with every sample. Times in seconds.

    The properties are of all windows; a row reports those of `counted`.
    """

    engine: str
    provider: str
    sizes: Sizes
    load_s: float
    first_call_s: float
    warmup_s: float
    warmup_calls: int
    remote: bool = False
    memory: Peak = field(default_factory=Peak)
    windows: list[Window] = field(default_factory=list)

    @property
    def samples_s(self) -> list[float]:
        return [sample for window in self.windows for sample in window.samples_s]

    @property
    def rows_per_s(self) -> float:
        """Rows of the batch over the time from first to last of each window."""
        return self.sizes[BATCH] * len(self.samples_s) / sum(window.wall_s for window in self.windows)

    @property
    def cpu_s_per_call(self) -> float | None:
        """CPU time of the process, of all its threads; None where another process does the work."""
        return None if self.remote else sum(window.cpu_s for window in self.windows) / len(self.samples_s)

    @property
    def run_median_s(self) -> float:
        return float(np.median(self.samples_s))

    @property
    def refused(self) -> int:
        return sum(window.refused for window in self.windows)

    @property
    def stable(self) -> bool:
        """Whether the windows end in a steady stretch."""
        return steady_from(self.windows) is not None

    @property
    def counted_from(self) -> int:
        """Index of the first window that counts: of the steady stretch, or 0 where there is none."""
        return steady_from(self.windows) or 0

    @property
    def counted(self) -> "Measurement":
        """The same measurement with only the windows that count."""
        return replace(self, windows=self.windows[self.counted_from :])


class Worker:
    """A child process that holds one open engine and measures a window on request.

    It runs the code in `checkout`, by the interpreter that the engine needs. `EngineError` when the engine cannot open,
    answers too late or dies, or is not the one expected; the process has ended then.
    """

    def __init__(self, root: Path, options: Mapping[str, Any], checkout: Path = CHECKOUT) -> None:
        self.engine = str(options.get("engine") or Artifact.load(root).runtime)
        command = [interpreter(self.engine), "-m", worker_module(checkout) or WORKERS[0]]
        self._pipe, child = socket.socketpair()
        with child:
            self._process = subprocess.Popen(
                [*command, str(child.fileno())],
                pass_fds=[child.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # libraries print; --json prints JSON only
                cwd=checkout,  # where -m looks first
                env={**os.environ, "PYTHONPATH": str(checkout)},
            )
        self._answers = self._pipe.makefile("r")
        opened = self._request(wire.opening(root, options), START_TIMEOUT_S)
        self.load_s, self.remote = float(opened["load_s"]), bool(opened["remote"])
        if (opened["engine"], opened["protocol"]) != (self.engine, wire.PROTOCOL):
            self.close()
            raise EngineError(
                f"expected engine {self.engine}, protocol {wire.PROTOCOL}; found {opened}; update {checkout}"
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def prepare(self, sizes: Sizes) -> Measurement:
        """An empty measurement at these sizes, to which windows are added; the engine is warm."""
        answer = self._request(wire.prepare(sizes), START_TIMEOUT_S)
        return Measurement(engine=self.engine, sizes=sizes, load_s=self.load_s, remote=self.remote, **answer)

    def window(self, load: wire.Request) -> Window:
        """One window under a load such as `wire.closed_loop(0.2)`."""
        return Window(**self._request(load, START_TIMEOUT_S + float(load["seconds"])))

    def close(self) -> None:
        """Close the socket, which ends the process; kill it if it has not ended after CLOSE_TIMEOUT_S."""
        self._answers.close()
        self._pipe.close()
        try:
            self._process.wait(CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _request(self, request: wire.Request, timeout_s: float) -> dict[str, Any]:
        self._pipe.settimeout(timeout_s)
        try:
            self._pipe.sendall(json.dumps(request).encode() + b"\n")
            line = self._answers.readline()
        except TimeoutError as error:
            self._process.kill()
            self.close()
            raise EngineError(f"expected an answer within {timeout_s:g} s, found none") from error
        except OSError as error:
            raise self._died() from error
        if not line:
            raise self._died()
        answer: dict[str, dict[str, Any]] = json.loads(line)
        if "error" in answer:
            self.close()
            raise EngineError(str(answer["error"]))
        return answer["ok"]

    def _died(self) -> EngineError:
        """The error for a process that has ended; its status is collected, so that no zombie stays."""
        self.close()
        return EngineError(f"the engine's process died with status {self._process.returncode}")


def worker_module(checkout: Path) -> str | None:
    """The module of the worker in this checkout, by its name there; None if the folder is no checkout."""
    return next((name for name in WORKERS if checkout.joinpath(*name.split(".")).with_suffix(".py").is_file()), None)


def interpreter(engine: str) -> str:
    """The Python interpreter with the packages of an engine; `EngineError` where its environment was not made."""
    name = plugins.load("runtimes.engines", engine, "RUNTIME").environment
    if not name:
        return sys.executable
    found = [folder / name / "bin" / "python" for folder in (CHECKOUT, Path(sys.prefix).parent, Path.cwd())]
    python = next((path for path in found if path.exists()), None)
    if python is None:
        raise EngineError(
            f"engine {engine}: expected its environment in {found[0].parents[1]}, found none; make it with the Makefile"
        )
    return str(python)
