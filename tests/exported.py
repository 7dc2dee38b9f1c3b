"""What is costly to make, made once for all test files and, under pytest-xdist, for all its processes."""

import contextlib
import fcntl
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import export.all
from runtimes import plugins

ONNX = "onnx"  # leads the ensembles


def common_folder(factory: pytest.TempPathFactory) -> Path:
    """The temporary folder of this run of pytest, the same in all its processes."""
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """No other process is at work in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def made_once(place: Path, make: Callable[[Path], None]) -> Path:
    """A folder that `make` has filled, for the first who asks; nobody may change what is in it."""
    with alone(place):
        made, draft = place / "made", place / "draft"
        if not made.exists():
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir()
            make(draft)
            draft.rename(made)
    return made


class Exports:
    """Artifacts of the untrained checkpoints: a model is exported to each target once, and traced once for all."""

    def __init__(self, folder: Path, checkpoints: Path) -> None:
        self.folder, self.checkpoints = folder, checkpoints

    def cells(self, model: str, targets: Sequence[str]) -> dict[str, Any]:
        """What export.all said of the model by target; those that nobody has asked for are exported now, in one run."""
        home = self.folder / model
        with alone(home):
            told = home / "cells.json"
            known = json.loads(told.read_text()) if told.exists() else {}
            if missing := [target for target in targets if target not in known]:
                known |= self._export(model, missing)
                told.write_text(json.dumps(known))
        return {target: known[target] for target in targets}

    def onnx(self, repository: Path, *models: str) -> Path:
        """The new `repository` with these models as `export.all --target onnx` leaves it."""
        others = [name for name in plugins.names("export.targets") if name != ONNX]
        for model in models:
            assert self.cells(model, [ONNX])[ONNX]["status"] == "ok"
            with alone(self.folder / model):
                omitted = shutil.ignore_patterns(*(f"{model}_{target}" for target in others))
                shutil.copytree(self._repository(model), repository, ignore=omitted, dirs_exist_ok=True)
        return repository

    def _repository(self, model: str) -> Path:
        return self.folder / model / "repository"

    def _export(self, model: str, targets: Sequence[str]) -> dict[str, Any]:
        chosen = [part for target in targets for part in ("--target", target)]
        places = ["--checkpoints", str(self.checkpoints), "--repository", str(self._repository(model))]
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as errors:
            status = export.all.main([model, *chosen, *places, "--json"])
        assert "Traceback" not in errors.getvalue()
        cells = json.loads(out.getvalue())["cells"]
        statuses = {cell["status"] for cell in cells}
        assert status == ("failed" in statuses or statuses == {"skipped"})
        return {cell["target"]: cell for cell in cells}
