"""A server in the background of this program: at a free port, with a log, and stopped when the program ends."""

import contextlib
import http.client
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, ClassVar, TypeVar

from runtimes.errors import EngineError, InputError, one_line
from runtimes.host.process_guard import STOP_TIMEOUT_S
from runtimes.host.process_log import ServerLog

PACKAGE = Path(__file__).parents[1]
GUARD = PACKAGE / "host" / "process_guard.py"
LOOPBACK = "127.0.0.1"
EVERYWHERE = "0.0.0.0"

Started = TypeVar("Started", bound="BackgroundServer")


class BackgroundServer(ABC):
    """A context manager: inside it a server is ready; `EngineError` with a line of its log if it is not ready in time.

    A subclass implements `launch`, which calls `start`, and `is_ready`. Output is copied to `log`, a file or a stream.
    """

    name: ClassVar[str]
    telling: ClassVar[Sequence[str]]  # parts of log lines with the reason of a failure, the most specific first
    hopeless: ClassVar[Sequence[str]] = ()  # parts of log lines after which a running server never gets ready

    def __init__(self, *, log: Path | IO[bytes] | None, start_timeout_s: float) -> None:
        self.log = log
        self.start_timeout_s = start_timeout_s
        self.folder: Path | None = None
        self._log: ServerLog | None = None
        self._guard: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def launch(self) -> None:
        """Choose ports, and `start` the server."""

    @abstractmethod
    def is_ready(self) -> bool:
        """Whether the server answers requests."""

    @property
    @abstractmethod
    def subject(self) -> str:
        """The name of the served folder or model, for messages."""

    def __enter__(self: Started) -> Started:
        with contextlib.ExitStack() as if_it_fails:
            if_it_fails.callback(self.close)
            self.launch()
            self._wait_until_ready()
            if_it_fails.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the server and wait until its processes and files are gone. Closing twice is allowed."""
        if self._guard and self._guard.stdin:
            self._guard.stdin.close()
            self._guard.wait(2 * STOP_TIMEOUT_S)
        if self._log:
            self._log.drain()
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def running(self) -> bool:
        return self._guard is not None and self._guard.poll() is None

    @property
    def pid(self) -> int:
        """The process whose descendants are the server and its children."""
        assert self._guard is not None, "pid outside of the with block"
        return self._guard.pid

    def log_lines(self) -> list[str]:
        """The lines that the server has written so far, without empty ones and no more than the last 2,000."""
        if self._log is None:
            return []
        if not self.running:
            self._log.drain()
        return self._log.lines()

    def log_tail(self, lines: int = 20) -> str:
        """The last lines the server wrote."""
        return "\n".join(self.log_lines()[-lines:])

    def failure(self) -> str:
        """The line of the log with the reason of the failure, or else its last one."""
        lines = self.log_tail(200).splitlines() or ["nothing"]
        telling = (line for sign in self.telling for line in reversed(lines) if sign in line)
        return " ".join(next(telling, lines[-1]).strip("| ").split())

    def make_folder(self) -> Path:
        """A new folder for the server's files, which is removed with the server."""
        self.folder = Path(tempfile.mkdtemp(prefix=f"slipway-{self.name.lower()}-"))
        return self.folder

    def start(self, command: Sequence[str | Path], environment: Mapping[str, str]) -> None:
        """Run `command` under the guard, its shared memory named after the folder."""
        folder = self.folder or self.make_folder()
        self._guard = subprocess.Popen(
            [sys.executable, "-I", GUARD, folder, folder.name, *command],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches only the program that started the server
        )
        assert self._guard.stdout
        self._log = ServerLog(self._guard.stdout, self.log)

    def _wait_until_ready(self) -> None:
        end = time.monotonic() + self.start_timeout_s
        while not self.is_ready():
            if not self.running or any(sign in self.log_tail(200) for sign in self.hopeless):
                raise EngineError(f"expected {self.name} to start on {self.subject}, found: {self.failure()}")
            if time.monotonic() > end:
                raise EngineError(
                    f"expected {self.name} to be ready within {self.start_timeout_s:g} s on {self.subject}, "
                    f"found it not ready; the log ends: {self.failure()}"
                )
            time.sleep(0.05)


def choose_ports(host: str, ports: Sequence[int | None]) -> tuple[int, ...]:
    """The requested ports, with free ones for None; `InputError` for one in use."""
    with contextlib.ExitStack() as held:
        return tuple(_hold(held, host, port) for port in ports)


def _hold(held: contextlib.ExitStack, host: str, port: int | None) -> int:
    listener = held.enter_context(socket.socket())
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was just released counts as free
    try:
        listener.bind((host, port or 0))
    except OSError as error:
        raise InputError(f"expected a free port at {host}:{port}, found {one_line(error)}; choose another") from error
    return int(listener.getsockname()[1])


def answers(url: str, path: str, timeout_s: float = 1.0) -> bool:
    """Whether the server at `url` ("host:port") answers a GET of `path` with status 200 in time."""
    with contextlib.closing(http.client.HTTPConnection(url, timeout=timeout_s)) as connection:
        try:
            connection.request("GET", path)
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False


def find_venv(variable: str, name: str) -> Path:
    """The virtual environment that `variable` names, or the one called `name` beside this package, program or folder.

    The first of these places if there is none in any.
    """
    if named := os.environ.get(variable):
        return Path(named).absolute()
    candidates = [folder / name for folder in (PACKAGE.parent, Path(sys.prefix).parent, Path.cwd())]
    return next((folder for folder in candidates if (folder / "bin" / "python3").exists()), candidates[0])
