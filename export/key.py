"""The artifact key: one digest of everything that the bytes of an artifact and the proof of its parity depend on.

Code counts by its syntax tree without docstrings: an edit of a comment, a docstring or the format of a line changes no
key. Commands, and code that only trains, are not reached from what is traced, and change no key either.
"""

import ast
import hashlib
import importlib.metadata
import inspect
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields
from functools import cache, partial
from pathlib import Path
from typing import Any

import export
from export.calibration_texts import CalibrationTexts
from export.target import Target
from runtimes.artifact import sha256_json
from runtimes.host.gpu import gpu
from runtimes.pipeline import find_pipeline
from training.checkpoint import Checkpoint
from training.spec import ModelSpec

PACKAGES = ("export", "training", "runtimes")


def artifact_key(
    spec: ModelSpec, target: Target, precision: str, checkpoint: Checkpoint, texts: CalibrationTexts
) -> str:
    """sha256 of checkpoint, code, declared values, precision, library versions, GPU architecture, calibration texts."""
    found = gpu()
    return sha256_json(
        {
            "checkpoint": checkpoint.digest,
            "code": {path.as_posix(): code_digest(root / path) for root, path in code_files(spec, target)},
            "declared": declared(spec, precision),
            "target": target.name,
            "precision": precision,
            "libraries": library_versions(target.packages),
            "gpu": found.architecture if found else None,
            **({"texts": texts.identity} if target.reads_texts else {}),
        }
    )


def declared(spec: ModelSpec, precision: str) -> dict[str, Any]:
    """The values in the declaration of a model that decide bytes and proof; its functions count as code."""
    tolerance = spec.parity.tolerance.get(precision)
    return {"tolerance": asdict(tolerance) if tolerance else None, "fp32_modules": spec.export.fp32_modules}


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
    """(root, path below it) of the code that decides an artifact's bytes and its proof, found by its imports.

    It starts at the functions of the declaration, the pipeline, the target and the engine. Code outside this checkout
    has its folder as root.
    """
    top = Path(export.__file__).parent.parent
    modules = ["export.source", "export.parity", f"runtimes.engines.{target.runtime}"]
    waiting = [
        Path(inspect.getfile(find_pipeline(spec.pipeline))),
        Path(inspect.getfile(target.convert)),
        *(Path(inspect.getfile(function)) for function in functions(spec)),
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


def functions(spec: ModelSpec) -> Iterator[Any]:
    """Every function in the declaration of a model, that of a partial application included."""
    for part in (spec.interface, spec.parity, spec.export):
        for field in fields(part):
            value = getattr(part, field.name)
            while isinstance(value, partial):
                value = value.func
            own_class = inspect.isclass(value) and value.__module__ != "builtins"
            if inspect.isfunction(value) or inspect.ismethod(value) or own_class:
                yield value


def code_digest(path: Path) -> str:
    """sha256 of the code in a file, without its docstrings, comments and format."""
    return _code_digest(path.read_text(encoding="utf-8"))


@cache
def _code_digest(text: str) -> str:
    tree = ast.parse(text)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in [node for node in ast.walk(tree) if isinstance(node, documented)]:
        if ast.get_docstring(node, clean=False) is not None:
            node.body[:1] = [] if node.body[1:] else [ast.Pass()]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()


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
    """Every name that is imported anywhere in this code, with the module it comes from; imports for types excepted."""
    names: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(code)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            waiting += node.orelse
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return frozenset(names)
