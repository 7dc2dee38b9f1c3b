"""The measuring scripts: each has a help that names it, and the parts of them that a change elsewhere can break."""

import ast
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.noise import noise

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "benchmarks").rglob("*.py")
    if "\n@command\n" in path.read_text()
)


def test_there_are_scripts_in_every_family() -> None:
    families = {path.parent.name for path in (ROOT / "benchmarks").glob("*/*.py")}
    assert {script.split(".")[1] for script in SCRIPTS} == families


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_runs_from_the_root_and_has_commands_to_paste(script: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", script, "--help"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count(f"  python -m {script}") >= 2


def test_the_variants_of_the_peers_start_without_this_project() -> None:
    """Their environments have neither this project nor its folder on the path."""
    path = ROOT / "benchmarks" / "peers_cpu" / "variants.py"
    top_level = {node.module for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom)}
    assert not any((name or "").startswith(("runtimes", "training", "export", "benchmarks")) for name in top_level)


@pytest.mark.parametrize("path", sorted(path.name for path in (ROOT / "benchmarks").rglob("*.md")))
def test_dated_results_name_scripts_that_exist(path: str) -> None:
    text = next((ROOT / "benchmarks").rglob(path)).read_text()
    for word in text.replace("`", " ").split():
        if word.startswith("benchmarks.") and word.count(".") == 2:
            assert (ROOT / Path(*word.rstrip(".,;:").split("."))).with_suffix(".py").is_file(), word
        assert not (word.startswith("benchmarks/") and word.endswith(".py")), "python -m benchmarks.FAMILY.SCRIPT"


def test_the_slowdown_can_be_planted_in_the_engine(tmp_path: Path) -> None:
    slowed = noise.copy_checkout(tmp_path / "slow", tmp_path, 0.2) / "runtimes" / "engines" / "onnxruntime.py"
    same = noise.copy_checkout(tmp_path / "same", tmp_path, 0.0) / "runtimes" / "engines" / "onnxruntime.py"
    assert same.read_text() == (ROOT / "runtimes" / "engines" / "onnxruntime.py").read_text()
    compile(slowed.read_text(), "slowed", "exec")
    assert "0.2 * (perf_counter() - began)" in slowed.read_text()


def test_planted_comparisons_are_spread_over_the_others() -> None:
    arguments = SimpleNamespace(comparisons=4, planted=2, share=0.2)
    slower, same = ("20% slower", 0.2), ("the same", 0.0)
    assert noise.kinds(arguments) == [slower, same, same, slower, same, same]
    assert noise.kinds(SimpleNamespace(comparisons=2, planted=0, share=0.2)) == [same, same]
