"""The artifact key depends on every file that model, target, pipeline and engine import, and on no other code."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from export.key import code_files, declared, imported, source_file
from export.target import Target
from runtimes import plugins
from training.models.policy import recipe
from training.spec import Tolerance, all_specs, find_spec

ROOT = Path(__file__).parents[2]


def files(model: str, target: str = "onnx") -> set[str]:
    chosen: Target = plugins.load("export.targets", target, "TARGET")
    return {path.as_posix() for root, path in code_files(find_spec(model), chosen) if root == ROOT}


@pytest.mark.parametrize(
    ("model", "target", "expected"),
    [
        (
            "strategy",
            "onnx",
            {"training/frozen.py", "runtimes/pipelines/strategy/dialogue.py", "export/quantization/static.py"},
        ),
        (
            "hallucination",
            "torch",
            {"training/frozen.py", "runtimes/pipelines/hallucination/grounding.py", "runtimes/engines/torch.py"},
        ),
        (
            "policy_mamba",
            "openvino",
            {"runtimes/pipelines/policy/melee.py", "training/layers/scan.py", "runtimes/engines/openvino.py"},
        ),
        (
            "hnet",
            "onnx",
            {"runtimes/pipelines/hnet/byte_text.py", "training/layers/rnn.py", "runtimes/pipelines/hnet/scoring.py"},
        ),
    ],
)
def test_traced_code_and_code_that_verifies_it_are_found(model: str, target: str, expected: set[str]) -> None:
    proof = {"export/parity.py", "export/source.py", "runtimes/tensors.py", "runtimes/runtime.py"}
    assert expected | proof | {f"export/targets/{target}.py"} <= files(model, target)


def test_commands_servers_and_other_models_are_not_found() -> None:
    found = files("strategy")
    assert not found & {"export/all.py", "runtimes/serve.py", "runtimes/bench/__main__.py", "runtimes/triton/server.py"}
    assert not any(path.startswith(("tests/", "training/models/hnet", "training/models/policy")) for path in found)


THEIRS = """
class Theirs:
    def encode(self):
        from runtimes.pipelines.policy.melee import INPUT_WIDTH

PIPELINES = {"theirs": Theirs}
"""


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of somebody else's pipelines."""
    import runtimes.pipelines

    (tmp_path / "theirs.py").write_text(THEIRS)
    monkeypatch.setattr(runtimes.pipelines, "__path__", [*runtimes.pipelines.__path__, str(tmp_path)])
    return tmp_path


def test_a_plug_in_from_elsewhere_counts_with_what_it_imports(elsewhere: Path) -> None:
    target: Target = plugins.load("export.targets", "onnx", "TARGET")
    found = code_files(replace(find_spec("statements"), pipeline="theirs"), target)
    assert (elsewhere, Path("theirs.py")) in found
    assert (ROOT, Path("runtimes/pipelines/policy/melee.py")) in found


def test_names_are_followed_to_files() -> None:
    assert source_file("training.models.policy.recipe") == Path(recipe.__file__)
    assert source_file("training.models.policy") == Path(recipe.__file__).with_name("__init__.py")
    assert source_file("training.models.policy.recipe.Recipe") is None
    assert source_file("numpy.linalg") is None
    assert imported("if x:\n    from a.b import c\nimport d.e") == {"a.b", "a.b.c", "d.e"}


# Edits of code ------------------------------------------------------------------------------------------------------

MODELS = sorted(all_specs())
CORE = ("run", "loop", "sweep", "evaluate", "precompute", "embed_dataset", "recipe", "settings", "frozen_store")
ONLY_TRAINING = (
    *(f"training/{name}.py" for name in CORE),
    *(path.relative_to(ROOT).as_posix() for path in ROOT.glob("training/models/*/recipe.py")),
    *(path.relative_to(ROOT).as_posix() for path in ROOT.glob("training/models/*/training.py")),
    *(path.relative_to(ROOT).as_posix() for path in ROOT.glob("training/models/*/data.py")),
)
COMMANDS = ("export/all.py", "runtimes/host/cli.py", "runtimes/serve.py", "runtimes/bench/__main__.py")
EDIT_AND_COMPARE = """
import json, sys
from pathlib import Path
from export.key import code_digest, code_files
from runtimes import plugins
from training.spec import all_specs

target = plugins.load("export.targets", "onnx", "TARGET")
def codes():
    return {name: [code_digest(root / path) for root, path in code_files(spec, target)]
            for name, spec in all_specs().items()}

changed = {}
for name, edits in json.loads(sys.stdin.read()).items():
    before = codes()
    for file, text in edits.items():
        Path(file).write_text(text)
    after = codes()
    changed[name] = sorted(model for model in before if before[model] != after[model])
print(json.dumps(changed))
"""


def with_other_docstrings(text: str) -> str:
    """The code with every docstring of one line replaced, and a comment at its end."""
    lines = text.splitlines()
    for i, line in enumerate(lines):
        if line.strip().startswith(QUOTES) and line.endswith(QUOTES) and len(line.strip()) > len(2 * QUOTES):
            lines[i] = f"{line[: line.index(QUOTES)]}{QUOTES}Edited.{QUOTES}"
    return "\n".join([*lines, "# an edited comment", ""])


QUOTES = '"' * 3


def edited(*names: str) -> dict[str, str]:
    """These files with one more statement."""
    return {name: (ROOT / name).read_text() + "\nEDITED = 1\n" for name in names}


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The models whose keys change, by name of an edit in a copy of the packages."""
    copy = tmp_path_factory.mktemp("copy")
    for package in ("runtimes", "training", "export"):
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    every = [path.relative_to(copy).as_posix() for path in copy.rglob("*.py")]
    edits = {
        "docstrings": {name: with_other_docstrings((ROOT / name).read_text()) for name in every},
        "training": edited(*ONLY_TRAINING),
        "commands": edited(*COMMANDS),
        "policy": edited("training/models/policy/module.py"),
        "strategy agreement": edited("training/models/strategy/spec.py"),
        "form": edited("training/layers/form.py"),
    }
    assert sum(edits["docstrings"][name] != (ROOT / name).read_text() for name in every) == len(every)
    done = subprocess.run(
        [sys.executable, "-c", EDIT_AND_COMPARE],
        input=json.dumps(edits), capture_output=True, text=True, check=False, cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-1000:]
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("edit", ["docstrings", "training", "commands"])
def test_no_key_changes_with_a_docstring_a_command_or_code_that_only_trains(
    changed: dict[str, list[str]], edit: str
) -> None:
    assert changed[edit] == []


@pytest.mark.parametrize(
    ("edit", "models"),
    [
        ("policy", [name for name in MODELS if name.startswith("policy_")]),
        ("strategy agreement", [name for name in MODELS if name.startswith("strategy")]),
        ("form", MODELS),
    ],
)
def test_keys_change_with_code_that_is_traced_or_verifies(
    changed: dict[str, list[str]], edit: str, models: list[str]
) -> None:
    assert changed[edit] == models


def test_a_declared_tolerance_and_fp32_modules_change_the_key() -> None:
    spec = find_spec("hallucination")
    other = replace(spec, export=replace(spec.export, fp32_modules=("encoder",)))
    looser = replace(spec, parity=replace(spec.parity, tolerance={"fp32": Tolerance(absolute=1, relative=1)}))
    assert declared(spec, "fp32") not in (declared(other, "fp32"), declared(looser, "fp32"))


def test_an_import_for_types_is_not_followed() -> None:
    code = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import a.b\nelse:\n    import c.d\n"
    assert imported(code) == {"typing", "typing.TYPE_CHECKING", "c.d"}
