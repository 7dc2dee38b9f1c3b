"""A file in a plug-in folder is an engine, a pipeline or a model without being listed."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import runtimes.engines
import runtimes.pipelines
from runtimes import plugins
from runtimes.artifact import Artifact, digests
from runtimes.errors import ArtifactError, EngineError, InputError
from runtimes.pipeline import Pipeline, all_pipelines, open_pipeline
from runtimes.runtime import Runtime, open_runtime
from runtimes.tensors import Axis, Signature, TensorSpec
from tests.runtimes.test_artifact import RAN
from training.spec import ModelSpec, all_specs, find_spec

PACKAGES = {
    "runtimes.engines": ("RUNTIME", Runtime),
    "runtimes.pipelines": ("PIPELINES", None),
    "training.models": ("SPECS", None),
    "export.targets": ("TARGET", None),
}

ENGINE = '''
"""Sums up: y[t] = carry + x[0] + ... + x[t]."""

import numpy as np

from runtimes.runtime import Runtime


class Summing(Runtime):
    engine = "summing"
    devices = ("cpu",)

    def open(self):
        self.refuse_device()
        self.factor = np.load(self.root / "factor.npy")

    def infer(self, feeds):
        sums = feeds["carry_in"][:, None] + np.cumsum(feeds["x"], 1)
        last = sums[:, -1].copy()
        last.flags.writeable = False  # as an engine may hand it out
        return {"y": self.factor * sums, "carry_out": last}

    @property
    def provider(self):
        return "numpy"


RUNTIME = Summing
'''

PIPELINE = '''
"""Numbers in, their running sums out."""

import numpy as np

from runtimes.pipeline import Pipeline, all_pipelines, open_pipeline


class Sums(Pipeline):
    def encode(self, requests):
        return {"x": np.array([request["numbers"] for request in requests], np.float32)}

    def decode(self, outputs):
        unit = (self.assets / "unit.txt").read_text()
        return [{"sums": row.tolist(), "unit": unit, "name": self.config["name"]} for row in outputs["y"]]

    def example(self):
        return {"numbers": [1.0, 2.0]}


PIPELINES = {"sums": Sums}
'''


@pytest.fixture
def add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[ModuleType, str, str], None]]:
    """Put a file of this name and text into a folder that the package then has as well."""
    added = []

    def put(package: ModuleType, name: str, text: str) -> None:
        folder = tmp_path / package.__name__
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.py").write_text(text)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
        added.append(f"{package.__name__}.{name}")

    yield put
    for module in added:
        sys.modules.pop(module, None)


@pytest.fixture
def root(tmp_path: Path, add: Callable[[ModuleType, str, str], None]) -> Path:
    """An artifact of the new engine and the new pipeline."""
    add(runtimes.engines, "summing", ENGINE)
    add(runtimes.pipelines, "sums", PIPELINE)
    root = tmp_path / "artifact"
    (root / "assets").mkdir(parents=True)
    (root / "assets" / "unit.txt").write_text("metre")
    np.save(root / "factor.npy", np.float32(2))
    batch, time = Axis(name="batch", min=1, opt=2, max=4), Axis(name="time", min=1, opt=4, max=8)
    signature = Signature(
        inputs=(
            TensorSpec(name="x", dtype="float32", shape=("batch", "time")),
            TensorSpec(name="carry_in", dtype="float32", shape=("batch",)),
        ),
        outputs=(
            TensorSpec(name="y", dtype="float32", shape=("batch", "time")),
            TensorSpec(name="carry_out", dtype="float32", shape=("batch",)),
        ),
        axes=(batch, time),
        state=(("carry_in", "carry_out"),),
    )
    Artifact(
        model="sums",
        target="summing",
        runtime="summing",
        precision="fp32",
        pipeline="sums",
        config={"name": "toy"},
        signature=signature,
        files=digests(root),
        built_with={},
        checkpoint="",
        key="",
        facts=RAN,
    ).save(root)
    return root


def test_a_new_engine_is_found_by_its_file_name_and_runs(root: Path) -> None:
    assert "summing" in plugins.names("runtimes.engines")
    with open_runtime(root) as runtime:
        assert (runtime.engine, runtime.provider) == ("summing", "numpy")
        outputs = runtime.fresh({"x": np.array([[1, 2, 3]], np.float32)})
    np.testing.assert_array_equal(outputs["y"], [[2, 6, 12]])


def test_a_new_pipeline_is_found_by_its_file_name_and_answers(root: Path) -> None:
    assert "sums" in plugins.names("runtimes.pipelines")
    with open_runtime(root) as runtime:
        pipeline = open_pipeline(runtime.artifact, root)
        requests = [pipeline.example(), {"numbers": [5.0, -5.0]}]
        answers = pipeline.decode(runtime.fresh(pipeline.encode(requests)))
    assert answers == [
        {"sums": [2.0, 6.0], "unit": "metre", "name": "toy"},
        {"sums": [10.0, 0.0], "unit": "metre", "name": "toy"},
    ]


def test_a_stream_carries_state_and_resets_only_the_rows_it_is_told(root: Path) -> None:
    ones = np.ones((3, 1), np.float32)
    with open_runtime(root) as runtime:
        stream = runtime.stream(3)
        for total in (1, 2, 3):
            outputs = stream.step({"x": ones})
            assert outputs.keys() == {"y"}
            np.testing.assert_array_equal(outputs["y"], 2 * total * ones)
        stream.reset([0, 2])
        np.testing.assert_array_equal(stream.step({"x": ones})["y"][:, 0], [2, 8, 2])


def test_two_streams_of_one_runtime_do_not_mix(root: Path) -> None:
    with open_runtime(root) as runtime:
        first, second = runtime.stream(), runtime.stream()
        for _ in range(3):
            first.step({"x": np.ones((1, 1), np.float32)})
        assert second.step({"x": np.ones((1, 1), np.float32)})["y"] == 2


def test_wrong_feeds_do_not_reach_the_engine(root: Path) -> None:
    with open_runtime(root) as runtime:
        for wrong, message in (
            ({"x": np.ones((5, 1), np.float32)}, r"batch 1\.\.4"),
            ({"x": np.ones((1, 9), np.float32)}, r"time 1\.\.8"),
            ({"x": np.full((1, 1), np.nan, np.float32)}, "finite"),
            ({"x": np.ones((1, 1))}, "float64"),
            ({"y": np.ones((1, 1), np.float32)}, "expected input 'x', found y"),
            ({}, "found none"),
            ({"x": 1.0}, "expected input 'x'|input 'x': expected"),
        ):
            with pytest.raises(InputError, match=message):
                runtime.fresh(wrong)


def test_an_engine_that_breaks_the_signature_is_not_believed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_runtime(root) as runtime:
        monkeypatch.setattr(runtime, "infer", lambda inputs: {"y": inputs["x"]})
        with pytest.raises(ArtifactError, match="the engine broke the signature: expected outputs y, carry_out"):
            runtime.fresh({"x": np.ones((1, 1), np.float32)})


def test_a_changed_file_is_noticed_before_it_is_run(root: Path) -> None:
    np.save(root / "factor.npy", np.float32(3))
    with pytest.raises(ArtifactError, match=r"factor\.npy: expected sha256"):
        open_runtime(root)
    with open_runtime(root, verify=False) as runtime:
        assert runtime.fresh({"x": np.ones((1, 1), np.float32)})["y"] == 3


def test_a_device_an_engine_does_not_have_is_refused(root: Path) -> None:
    with pytest.raises(EngineError, match="engine summing: expected a device of cpu here, found 'cuda'"):
        open_runtime(root, device="cuda").__enter__()


def test_a_new_model_is_found_and_keeps_to_its_signature(toy_model: ModelSpec, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    base = tmp_path / "base.safetensors"
    save_file({"weight": torch.ones(4, 3), "bias": torch.zeros(4)}, base)
    assert all_specs()["toy"] is toy_model
    config = {**toy_model.preset("tiny"), "base": str(base)}
    own, built = toy_model.interface.signature(config), toy_model.interface.build(config)
    assert [part.prefix for part in toy_model.interface.frozen(config)] == ["base"]
    inputs = toy_model.parity.draw_inputs(config, np.random.default_rng(0), own.sizes("opt"), {})
    (scores,) = built(*(torch.from_numpy(inputs[tensor.name]) for tensor in own.inputs))
    own.check_outputs({"scores": scores.detach().numpy()}, own.check_inputs(inputs))


def test_a_new_model_is_gone_when_its_folder_is() -> None:
    assert "toy" not in all_specs()


@pytest.mark.parametrize("package", PACKAGES)
def test_an_unknown_name_gets_the_nearest_one(package: str) -> None:
    name = plugins.names(package)[0]
    with pytest.raises(InputError, match=f"found '{name}x'; did you mean '{name}'.* install the plug-in"):
        plugins.load(package, f"{name}x", PACKAGES[package][0])
    with pytest.raises(InputError, match=r"expected a known .*, found '\?\?'; install the plug-in that declares it"):
        plugins.load(package, "??", PACKAGES[package][0])


def test_an_unknown_model_or_preset_lists_what_there_is() -> None:
    with pytest.raises(InputError, match=r"expected a known model, found 'policy'; did you mean"):
        find_spec("policy")
    with pytest.raises(InputError, match="policy_gru: expected a preset of tiny, full; found 'huge'"):
        find_spec("policy_gru").preset("huge")


@pytest.mark.parametrize("name", ["../base", "policy.spec", "_private", "", "policy "])
def test_a_name_cannot_reach_out_of_its_folder(name: str) -> None:
    with pytest.raises(InputError):
        plugins.load("training.models", name, "SPECS")


@pytest.mark.parametrize(
    ("package", "name"), [(package, name) for package in PACKAGES for name in plugins.names(package)]
)
def test_every_plug_in_declares_what_its_folder_promises(package: str, name: str) -> None:
    constant, kind = PACKAGES[package]
    declared: Any = plugins.load(package, name, constant)
    if constant == "PIPELINES":
        assert all(issubclass(pipeline, Pipeline) for pipeline in declared.values())
    elif kind:
        assert issubclass(declared, kind)
    elif constant == "SPECS":
        assert all(isinstance(spec, ModelSpec) for spec in declared)
        assert {spec.pipeline for spec in declared} <= all_pipelines().keys()
    else:
        assert declared.name == name
        assert declared.runtime in plugins.names("runtimes.engines")


@pytest.mark.parametrize("name", plugins.names("runtimes.engines"))
def test_every_engine_has_the_name_of_its_file(name: str) -> None:
    assert plugins.load("runtimes.engines", name, "RUNTIME").engine == name
