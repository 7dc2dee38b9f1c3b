"""What an artifact is made by decides its key: every file that its model, target, pipeline and engine import."""

from dataclasses import replace
from pathlib import Path

import pytest

from export.key import code_files, imported, source_file
from export.target import Target
from runtimes import plugins
from training.models.policy import recipe
from training.spec import find_spec

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
def test_what_is_traced_and_what_proves_it_count(model: str, target: str, expected: set[str]) -> None:
    proof = {"export/parity.py", "export/source.py", "runtimes/tensors.py", "runtimes/runtime.py"}
    assert expected | proof | {f"export/targets/{target}.py"} <= files(model, target)


def test_what_no_artifact_depends_on_does_not() -> None:
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
