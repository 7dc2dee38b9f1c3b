"""The artifact key: one digest of everything that the bytes of an artifact depend on."""

import ast
import importlib.metadata
import inspect
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import export
from export.quantization.calibration_texts import CalibrationTexts
from export.target import Target
from runtimes.artifact import sha256_file, sha256_json
from runtimes.host.gpu import gpu
from runtimes.pipeline import find_pipeline
from training.checkpoint import Checkpoint
from training.spec import ModelSpec

PACKAGES = ("export", "training", "runtimes")


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


def code_files(spec: ModelSpec, target: Target) -> list[tuple[Path, Path]]:
    """(root, path below it) of the code that decides an artifact's bytes and its proof, by way of every import.

    Neither the command line nor a server is in it. Code outside this checkout has its folder as root.
    """
    top = Path(export.__file__).parent.parent
    modules = ["export.source", "export.parity", f"runtimes.engines.{target.runtime}"]
    waiting = [
        Path(inspect.getfile(find_pipeline(spec.pipeline))),
        Path(inspect.getfile(spec.build)),
        Path(inspect.getfile(target.convert)),
    ]
    waiting += [path for path in map(source_file, modules) if path]
    found: set[Path] = set()
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += [file for file in map(source_file, imported(path.read_text(encoding="utf-8"))) if file]
    return [
        (top, path.relative_to(top)) if path.is_relative_to(top) else (path.parent, Path(path.name))
        for path in sorted(found)
    ]


def source_file(name: str) -> Path | None:
    """The file of a module of this project or of a plug-in in it, which is not imported; None for any other name."""
    package, *parts = name.split(".")
    if package not in PACKAGES:
        return None
    folders, file = list(sys.modules[package].__path__), None
    for part in parts:
        package = f"{package}.{part}"
        files = [Path(folder, part).with_suffix(".py") for folder in folders]
        files += [Path(folder, part, "__init__.py") for folder in folders]
        file = next((each for each in files if each.is_file()), None)
        if file is None:
            return None
        loaded = getattr(sys.modules.get(package), "__path__", None)  # plug-ins of others may have been added to it
        folders = list(loaded or ([file.parent] if file.name == "__init__.py" else []))
    return file


@cache
def imported(code: str) -> frozenset[str]:
    """Every name that is imported anywhere in this code, with the module it comes from."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return frozenset(names)
