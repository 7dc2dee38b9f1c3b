"""The artifact key: one digest of everything that the bytes of an artifact depend on."""

import importlib.metadata
import inspect
from collections.abc import Iterable, Iterator
from pathlib import Path

import export
import runtimes
import training
from export.calibration_texts import CalibrationTexts
from export.target import Target
from runtimes.artifact import sha256_file, sha256_json
from runtimes.device import gpu
from training.checkpoint import Checkpoint
from training.spec import ModelSpec


def artifact_key(
    spec: ModelSpec, target: Target, precision: str, checkpoint: Checkpoint, texts: CalibrationTexts
) -> str:
    """sha256 of checkpoint, exporter code, precision, library versions, GPU architecture, and texts that are read."""
    found = gpu()
    return sha256_json(
        {
            "checkpoint": checkpoint.digest,
            "code": {path.as_posix(): sha256_file(root / path) for root, path in code_files(spec, target)},
            "target": target.name,
            "precision": precision,
            "libraries": library_versions(target.packages),
            "gpu": found.architecture if found else None,
            **({"texts": texts.identity} if target.reads_texts else {}),
        }
    )


def library_versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those packages that are installed."""
    result = {}
    for package in packages:
        try:
            result[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return result


def code_files(spec: ModelSpec, target: Target) -> Iterator[tuple[Path, Path]]:
    """(root, path below it) of the code that decides an artifact's bytes and its proof: no command line, no server."""
    top = Path(export.__file__).parent.parent
    model = Path(inspect.getfile(spec.build)).parent
    target_file = Path(inspect.getfile(target.convert))
    exporter = [
        Path(export.__file__).parent / f"{name}.py"
        for name in ("source", "lowering", "calibration", "calibration_texts", "quantization", "hugging_face", "parity")
    ]
    trainer = [Path(training.__file__).parent / name for name in ("scan.py", "cells.py", "language_model.py")]
    runtime = Path(runtimes.__file__).parent
    runner = [runtime / "tensors.py", runtime / "base.py", runtime / "pipelines" / f"{spec.pipeline}.py"]
    for path in sorted([*exporter, target_file, *trainer, *model.glob("*.py"), *runner]):
        if path.is_file():
            yield (top, path.relative_to(top)) if path.is_relative_to(top) else (path.parent, Path(path.name))
