"""The core of export names no plug-in: a target, engine, backend, pipeline or model declares what the core needs."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import export
from runtimes import plugins

FOLDER = Path(export.__file__).parent
PACKAGES = ("export.targets", "export.triton.backends", "runtimes.engines", "runtimes.pipelines", "training.models")
# The steps that targets share work on ONNX files and Hugging Face folders; they are not of the core.
SHARED_STEPS = {"lowering.py", "hugging_face.py"}
CORE = sorted({*FOLDER.glob("*.py"), *(FOLDER / "triton").glob("*.py")} - {FOLDER / name for name in SHARED_STEPS})
NAMES = {name for package in PACKAGES for name in plugins.names(package)}


def named_in(code: str) -> Iterator[str]:
    """The plug-ins that this code imports or has as a text of its own; docstrings and longer texts do not count."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Constant) and node.value in NAMES:
            yield node.value
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (module for module in modules if module.startswith(tuple(f"{package}." for package in PACKAGES)))


def test_the_core_is_what_is_looked_at() -> None:
    names = {path.relative_to(FOLDER).as_posix() for path in CORE}
    assert {"all.py", "convert.py", "target.py", "triton/config.py", "triton/lint.py", "triton/repository.py"} <= names
    assert {"onnx", "vllm", "tensorrt", "onnxruntime", "hnet"} <= NAMES


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.relative_to(FOLDER).as_posix())
def test_the_core_names_no_plug_in(path: Path) -> None:
    assert list(named_in(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("planted", "found"),
    [
        ("if artifact.runtime != 'vllm':\n    pass", ["vllm"]),
        ("BACKENDS = {'onnxruntime': 'model.onnx'}", ["onnxruntime"]),
        ("best = min(able, key=lambda target: target != 'onnx')", ["onnx"]),
        (
            "def f():\n    from runtimes.pipelines.hnet.step import can_write",
            ["runtimes.pipelines.hnet.step.can_write"],
        ),
        ("from export.targets import tensorrt", ["export.targets.tensorrt"]),
        ('"""Serves vllm."""\nx = "a backend such as vllm"', []),
    ],
)
def test_a_planted_name_is_found(planted: str, found: list[str]) -> None:
    assert list(named_in(planted)) == found
