"""The core of runtimes names no plug-in and no model: engines and pipelines declare what the core needs."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import runtimes
from runtimes import plugins
from training.spec import all_specs

FOLDER = Path(runtimes.__file__).parent
PLUG_INS = ("engines", "pipelines", "previous_names")  # previous_names: modules under the names of the version before
PACKAGES = ("runtimes.engines", "runtimes.pipelines")
NAMES = {name for package in PACKAGES for name in plugins.names(package)} | set(all_specs())
# Names that are also words: what they mean in the files (or folders) of the core where they stand.
ALLOWED = {
    "host/environment.py": ({"onnxruntime", "openvino", "tensorrt", "torch", "transformers"}, "recorded versions"),
    "host/cli.py": ({"statements", "strategy", "torch", "transformers"}, "packages, and the extras that install them"),
    "triton/server.py": ({"triton"}, "a folder of the package runtimes"),
    "vllm/server.py": ({"vllm"}, "the package whose environment is looked for"),
    "search/papers.py": ({"statements"}, "a key of the files with papers, and their number"),
    "search/collection.py": ({"statements"}, "the number of statements to read"),
    "web/server.py": ({"statements"}, "a key of the page's API"),
    "bench": ({"openvino", "optimum", "statements", "tensorrt", "torch", "transformers", "triton", "vllm"}
              | {"policy_mamba"},
              "labels, colours and peers of the measurements, and a model in the examples of its help"),
}  # fmt: skip


def core() -> list[Path]:
    return [path for path in sorted(FOLDER.rglob("*.py")) if path.relative_to(FOLDER).parts[0] not in PLUG_INS]


def named_in(code: str) -> Iterator[str]:
    """Plug-ins and models that are imported, or stand as an identifier or as a whole text; docstrings do not count."""
    for node in ast.walk(ast.parse(code)):
        words: list[str | None] = []
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            words = [node.value]
        elif isinstance(node, ast.Name | ast.Attribute | ast.arg | ast.keyword | ast.FunctionDef | ast.ClassDef):
            words = [getattr(node, key, None) for key in ("id", "attr", "arg", "name")]
        elif isinstance(node, ast.Import | ast.ImportFrom):
            prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            modules = [f"{prefix}{alias.name}" for alias in node.names]
            yield from (module for module in modules if module.startswith(PACKAGES))
        yield from (word for word in words if word in NAMES)


def allowed(path: Path) -> set[str]:
    place = path.relative_to(FOLDER).as_posix()
    return {name for prefix, (names, _) in ALLOWED.items() if place.startswith(prefix) for name in names}


def test_the_names_and_the_files_of_the_core_are_found() -> None:
    assert {"onnxruntime", "hnet", "policy_gru", "hallucination_aarf", "statements"} <= NAMES
    files = {path.relative_to(FOLDER).as_posix() for path in core()}
    assert {"generate.py", "runtime.py", "triton/steps/write.py", "search/embedder.py"} <= files


@pytest.mark.parametrize("path", core(), ids=lambda path: path.relative_to(FOLDER).as_posix())
def test_the_core_names_no_plug_in_and_no_model(path: Path) -> None:
    assert set(named_in(path.read_text(encoding="utf-8"))) - allowed(path) == set()


# Not of the measurements: their names change with the peers that are measured.
@pytest.mark.parametrize("place", sorted(ALLOWED.keys() - {"bench"}))
def test_an_exception_is_in_use(place: str) -> None:
    assert set(named_in((FOLDER / place).read_text(encoding="utf-8"))) == ALLOWED[place][0]


@pytest.mark.parametrize(
    ("planted", "found"),
    [
        ("def serving_engine(a):\n    return 'triton_vllm' if a.runtime == 'vllm' else 'triton'",
         {"triton_vllm", "vllm", "triton"}),
        ("MODEL = 'statements'", {"statements"}),
        ("open_runtime(find(r, 'x'), engine='torch')", {"torch"}),
        ("def f():\n    from runtimes.pipelines.hnet.generation import SCHEMA",
         {"runtimes.pipelines.hnet.generation.SCHEMA"}),
        ("from runtimes.engines.torch import Torch", {"runtimes.engines.torch.Torch"}),
        ("import runtimes.engines.torch as engine", {"runtimes.engines.torch"}),
        ("models.policy_gru", {"policy_gru"}),
        ('"""Serves vllm."""\nx = parser("policy_gru --example")', set()),
    ],
)  # fmt: skip
def test_a_planted_name_is_found(planted: str, found: set[str]) -> None:
    assert set(named_in(planted)) == found
