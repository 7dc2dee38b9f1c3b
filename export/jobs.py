"""Cells filled in several processes, each of which exports one model at a time."""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from multiprocessing.connection import Connection, wait
from typing import Any

from export.convert import Cell, Options, Outcome, fill, find_cell, without_artifact
from export.source import LastSource
from runtimes.host.output_capture import native_talk_on_stderr
from runtimes.host.process_guard import end_with
from runtimes.host.progress import Progress

STOP_TIMEOUT_S = 10.0
THREADS = "OMP_NUM_THREADS"
SPAWN = multiprocessing.get_context("spawn")  # a fork would copy torch's threads in an unusable state


def fill_all(cells: Sequence[Cell], options: Options, jobs: int = 1) -> list[Outcome]:
    """The outcome of every cell, in the order of the cells; with more than one job they are filled in processes."""
    with Progress("export", len(cells)) as bar:
        return _fill_here(cells, options, bar) if jobs == 1 else _fill_in_processes(cells, options, jobs, bar)


def _fill_here(cells: Sequence[Cell], options: Options, bar: Progress) -> list[Outcome]:
    outcomes, sources = [], LastSource()
    for cell in cells:
        bar.describe(f"export {cell.label}")
        outcomes.append(fill(cell, options, sources))
        bar.advance()
    return outcomes


def _fill_in_processes(cells: Sequence[Cell], options: Options, jobs: int, bar: Progress) -> list[Outcome]:
    """A process fills all cells of a model, so that its original is restored and traced once.

    A process that dies fails the cell it was filling; another one takes over its other cells. No process is left when
    this function ends.
    """
    waiting = deque(list(group) for _, group in groupby(range(len(cells)), lambda index: cells[index].spec.name))
    outcomes: dict[int, Outcome] = {}
    workers: list[Worker] = []
    try:
        while len(outcomes) < len(cells):
            while waiting and len(workers) < jobs:
                workers.append(Worker(options, jobs))
            for worker in workers:
                if waiting and not worker.pending:
                    worker.give(cells, waiting.popleft())
            busy = [worker for worker in workers if worker.pending]
            bar.describe(f"export {', '.join(cells[worker.pending[0]].label for worker in busy)}")
            for worker in _ready(busy):
                index, outcome = worker.take(cells)
                outcomes[index] = outcome
                bar.advance()
                if not worker.alive:
                    workers.remove(worker)
                    waiting.extendleft([list(worker.pending)] if worker.pending else [])
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join()
    return [outcomes[index] for index in range(len(cells))]


class Worker:
    """A process that fills cells, and the cells it was given: `pending` holds their indices, the present one first."""

    def __init__(self, options: Options, jobs: int) -> None:
        self.pending: deque[int] = deque()
        self.alive = True
        self._connection, theirs = SPAWN.Pipe()
        self._process = SPAWN.Process(target=work, args=(theirs, options, os.getpid()), daemon=True)
        with _interrupts_blocked(), _threads_shared(jobs):
            self._process.start()
        theirs.close()  # so that the end of the process is the end of the pipe

    @property
    def connection(self) -> Connection:
        return self._connection

    def give(self, cells: Sequence[Cell], indices: Sequence[int]) -> None:
        """Let the process fill these cells, one after the other."""
        self.pending.extend(indices)
        names = [(cells[index].spec.name, cells[index].target.name, cells[index].precision) for index in indices]
        try:
            self._connection.send(names)
        except OSError:  # dead already; `take` reports it
            return

    def take(self, cells: Sequence[Cell]) -> tuple[int, Outcome]:
        """The index and the outcome of the present cell: failed if the process has ended instead of sending one."""
        index = self.pending.popleft()
        try:
            outcome: Outcome = self._connection.recv()
        except (EOFError, OSError):
            self.alive = False
            self.join()
            return index, without_artifact(cells[index], "failed", self._end())
        return index, outcome

    def terminate(self) -> None:
        """Ask the process to end."""
        self._process.terminate()

    def join(self) -> None:
        """Wait until the process has ended, and kill it if that takes too long."""
        self._process.join(STOP_TIMEOUT_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._connection.close()

    def _end(self) -> str:
        status = self._process.exitcode or 0
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        return (
            f"expected an outcome, found the end of the process that exported the cell, with {how}; "
            "export it alone, without --jobs, if memory was short"
        )


def work(connection: Connection, options: Options, parent: int) -> None:
    """The program of a worker: fills the cells it receives until the parent ends or stops it."""
    signal.signal(signal.SIGTERM, _exit)
    signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C is the parent's, which then stops its workers
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    end_with(parent)
    sources = LastSource()
    with native_talk_on_stderr():
        while True:
            try:
                names = connection.recv()
            except EOFError:
                return
            for name in names:
                connection.send(fill(find_cell(*name), options, sources))


def _exit(*_: Any) -> None:
    """SIGTERM ends a worker by way of its context managers, which stop the servers and remove the drafts it has."""
    raise SystemExit(128 + signal.SIGTERM)


def _ready(workers: Sequence[Worker]) -> Iterator[Worker]:
    """The workers that have sent an outcome or have ended, once there is one."""
    ready = wait([worker.connection for worker in workers])
    yield from (worker for worker in workers if worker.connection in ready)


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """A process started meanwhile receives no SIGINT before it can handle one."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _threads_shared(jobs: int) -> Iterator[None]:
    """A process started meanwhile has its share of the cores, where the environment names no number of threads."""
    if THREADS in os.environ:
        yield
        return
    os.environ[THREADS] = str(max(1, len(os.sched_getaffinity(0)) // jobs))
    try:
        yield
    finally:
        del os.environ[THREADS]
