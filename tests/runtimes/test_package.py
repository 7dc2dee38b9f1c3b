"""What `import runtimes` offers, and that the names of the version before still import and run."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import runtimes
from runtimes import previous_names
from runtimes.runtime import open_runtime


def test_open_runtime_is_imported_from_the_package() -> None:
    assert runtimes.open_runtime is open_runtime
    with pytest.raises(AttributeError, match="no attribute 'open_everything'"):
        runtimes.open_everything  # noqa: B018


def test_importing_the_package_imports_no_library() -> None:
    code = "import runtimes, sys; print(sorted({'numpy', 'torch', 'onnxruntime'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    code = code.replace("import runtimes,", "from runtimes import open_runtime; import")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == (
        "['numpy']\n"
    )


FOLDER = Path(runtimes.__file__).parent
PREVIOUS = sorted(path.stem for path in Path(previous_names.__file__).parent.glob("[a-z]*.py"))
COMMANDS = {"approximate", "search_bench", "vllm_bench", "write"}


def test_the_modules_of_the_version_before_are_known() -> None:
    assert set(PREVIOUS) == {"base", "waiting_line", "writing"} | COMMANDS


@pytest.mark.parametrize("name", PREVIOUS)
def test_a_previous_name_imports_as_a_module_of_runtimes(name: str) -> None:
    assert importlib.import_module(f"runtimes.{name}").__file__ == str(FOLDER / "previous_names" / f"{name}.py")


@pytest.mark.parametrize(("name", "attributes"), [
    ("base", {"Runtime", "open_runtime"}), ("waiting_line", {"Limits", "WaitingLine"}),
    ("writing", {"Desk", "Writing", "piece", "read_wish"}),
])  # fmt: skip
def test_a_previous_name_has_what_published_steps_import(name: str, attributes: set[str]) -> None:
    assert attributes <= set(vars(importlib.import_module(f"runtimes.{name}")))


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_a_command_runs_under_its_previous_name(name: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", f"runtimes.{name}", "--help"], capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "usage: " in ran.stdout
