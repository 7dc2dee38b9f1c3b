"""Declarations of models: what is checked, and what is imported only to train."""

import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest

from runtimes.errors import InputError
from training.recipe import Training
from training.spec import Export, ModelSpec, Parity, Tolerance, all_specs, find_spec

ROOT = Path(__file__).parents[2]
SPECS = list(all_specs().values())
GRU = find_spec("policy_gru")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Tolerance(absolute=-1.0, relative=0.0), "finite absolute part of 0 or more, found -1.0"),
        (lambda: Tolerance(absolute=0.0, relative=float("nan")), "finite relative part of 0 or more, found nan"),
        (lambda: replace(GRU.parity, tolerance={}), "a tolerance for at least one precision, found none"),
        (lambda: Export(skips={"onnx": ""}), "a reason for each skipped target, found none for onnx"),
        (lambda: Training(recipe=lambda: None, settings={}), "settings for at least one preset, found none"),  # type: ignore[arg-type, return-value]
        (lambda: replace(GRU, name="policy gru"), "a model name of letters, digits and underscores"),
        (lambda: replace(GRU, parent="policy_gru"), "another model as parent, found itself"),
        (lambda: replace(GRU, parent="policy_lstm"), "a part of policy_lstm has no training"),
    ],
    ids=["absolute", "relative", "tolerance", "skips", "settings", "name", "parent", "part"],
)
def test_a_wrong_declaration_is_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_every_preset_of_a_trained_model_has_training_settings(spec: ModelSpec) -> None:
    assert spec.trained != bool(spec.parent)
    if spec.trained:
        assert spec.training.settings.keys() == spec.presets.keys()
        assert spec.checkpoint == spec.name
    else:
        with pytest.raises(InputError, match=f"{spec.name} is a part of {spec.parent}; train that"):
            spec.training  # noqa: B018
        assert find_spec(spec.checkpoint).trained


def test_a_model_that_was_trained_elsewhere_has_no_training() -> None:
    other = replace(GRU, training_path="")
    assert not other.trained
    with pytest.raises(InputError, match="policy_gru: expected a model that is trained here"):
        other.training  # noqa: B018


def test_declarations_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        GRU.parity.tolerance = {}  # type: ignore[misc]
    with pytest.raises(TypeError):
        Parity(lambda *_: {}, lambda *_: {}, {})  # type: ignore[call-arg, misc]


def test_declarations_import_neither_torch_nor_code_that_only_trains() -> None:
    code = (
        "import sys; from training.spec import all_specs; all_specs()\n"
        "print(*sorted(name for name in sys.modules if name == 'torch' or name.startswith('training.')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    found = done.stdout.split()
    assert "training.models.policy.spec" in found
    assert [name for name in found if name.rpartition(".")[2] in ("torch", "recipe", "training", "loop", "run")] == []
