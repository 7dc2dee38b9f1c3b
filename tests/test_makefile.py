"""The Makefile documents itself: every target that is no file has one line in `make help`."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# The tests may run in a recipe of make, whose variables make an inner make print the folders that it enters.
NOT_IN_MAKE = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}


def make(*arguments: str) -> str:
    try:
        ran = subprocess.run(
            ["make", *arguments], capture_output=True, text=True, check=True, cwd=ROOT, env=NOT_IN_MAKE
        )
    except FileNotFoundError:
        pytest.skip("make is not installed")
    return ran.stdout


def targets() -> set[str]:
    text = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    found = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    assert found
    return set(found[1].split())


def test_help_has_one_line_for_every_target_and_make_alone_is_help() -> None:
    lines = make("help").splitlines()
    assert {line.split()[1] for line in lines} == targets()
    assert all(re.fullmatch(r"make [a-z-]+ +\S.{10,}", line) for line in lines)
    assert make().splitlines() == lines


@pytest.mark.parametrize(("target", "environments"), [("export", [".venv"]), ("test", [".venv", ".venv-triton"])])
def test_the_main_targets_set_up_what_they_need(target: str, environments: list[str]) -> None:
    text = (ROOT / "Makefile").read_text()
    rule = re.search(rf"^{target}: (.*?) ##", text, re.MULTILINE)
    assert rule
    assert rule[1].split() == [f"{name}/ready" for name in environments]
    for name in environments:
        assert f"\n{name}/ready: pyproject.toml\n\t$(PYTHON) -m venv {name}\n" in text


def test_every_file_that_a_target_runs_exists() -> None:
    text = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"\b((?:tests|benchmarks)/[\w/.-]+\.py)\b", text))
    assert named
    assert [name for name in named if not (ROOT / name).is_file()] == []
