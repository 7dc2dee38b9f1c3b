"""Cells filled in processes: the same outcomes in the same order, one failed cell per dead process, none left over."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from export.all import choose_cells
from export.calibration_texts import CalibrationTexts
from export.convert import Cell, Options, Outcome
from export.jobs import Worker, fill_all
from tests.toys import gone, wait_for

MODELS = ("policy_lstm", "policy_gru")


@pytest.fixture
def options(checkpoints: Path, tmp_path: Path) -> Options:
    return Options(checkpoints=checkpoints, repository=tmp_path / "repository", texts=CalibrationTexts(), dry_run=True)


def timeless(outcomes: Sequence[Outcome]) -> list[Outcome]:
    return [replace(outcome, seconds=0.0) for outcome in outcomes]


def test_processes_give_the_outcomes_of_one_process_in_the_same_order(options: Options) -> None:
    cells = list(choose_cells([], ["onnx", "vllm"], ["fp32", "int8"]))
    assert timeless(fill_all(cells, options, jobs=2)) == timeless(fill_all(cells, options))


def test_a_process_that_dies_fails_its_cell_and_another_goes_on(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    give, killed = Worker.give, []

    def give_and_kill(self: Worker, cells: Sequence[Cell], indices: Sequence[int]) -> None:
        if not killed:
            killed.append(self._process.pid)
            os.kill(self._process.pid, signal.SIGKILL)
            self._process.join()
        give(self, cells, indices)

    monkeypatch.setattr(Worker, "give", give_and_kill)
    cells = list(choose_cells(MODELS, ["onnx", "torch"], []))
    first, *others = fill_all(cells, options, jobs=2)
    assert (first.model, first.target, first.status) == (MODELS[0], "onnx", "failed")
    assert "found the end of the process that exported the cell, with signal SIGKILL" in first.reason
    assert [(each.model, each.target) for each in others] == [(cell.spec.name, cell.target.name) for cell in cells[1:]]
    assert all(each.exported for each in others)
    assert gone(killed[0])


def children(pid: int) -> set[int]:
    """The child processes of a process, without the one that multiprocessing keeps for itself."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {int(child) for child in found if b"resource_tracker" not in Path(f"/proc/{child}/cmdline").read_bytes()}


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_is_left_when_the_command_is_ended(sent: signal.Signals, checkpoints: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    places = ["--checkpoints", str(checkpoints), "--repository", str(repository)]
    command = [sys.executable, "-m", "export.all", *MODELS, "--target", "onnx", "--jobs", "2", *places]
    ran = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for(lambda: len(list((tmp_path / ".repository").glob("drafts/*/draft"))) == 2, 60)  # both are at work
    workers = children(ran.pid)
    assert len(workers) == 2
    started = time.monotonic()
    if sent == signal.SIGINT:
        os.killpg(ran.pid, sent)  # as Ctrl-C on a terminal, which the workers receive as well
    else:
        ran.send_signal(sent)
    assert ran.wait(30) == (130 if sent == signal.SIGINT else -sent)
    wait_for(lambda: all(map(gone, workers)), 30)
    assert time.monotonic() - started < 30
    assert ran.stderr
    printed = ran.stderr.read()
    assert "Traceback" not in printed
    if sent == signal.SIGINT:
        assert printed.endswith("interrupted\n")
    assert not any(repository.glob("*/config.pbtxt"))
