"""slipway.load: requests to answers, arrays to arrays and streams, by real published artifacts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import slipway
from runtimes import open_runtime, predict
from runtimes.artifact import Artifact
from runtimes.errors import ArtifactError, InputError, SlipwayError
from runtimes.repository import find
from tests.exported import Exports


@pytest.fixture(scope="module")
def model(gru_repository: Path) -> Any:
    with slipway.load("policy_gru", repository=gru_repository) as opened:
        yield opened


def drawn(model: slipway.Model, seed: int = 0, **sizes: int) -> dict[str, np.ndarray]:
    """Inputs without state that the signature allows; of integers only zeros and ones."""
    rng = np.random.default_rng(seed)
    sizes = {**model.signature.sizes("opt"), **sizes}
    result = {}
    for tensor in model.signature.free_inputs:
        shape = tensor.resolve(sizes)
        floats = tensor.dtype.startswith("float")
        result[tensor.name] = (rng.normal(size=shape) if floats else rng.integers(0, 2, shape)).astype(tensor.dtype)
    return result


def test_an_answer_is_that_of_predict(
    gru_repository: Path, model: slipway.Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request = model.example()
    file = tmp_path / "request.json"
    file.write_text(json.dumps(request))
    assert predict.main(["policy_gru", "--repository", str(gru_repository), "--input", str(file)]) == 0
    assert model.predict(request) == json.loads(capsys.readouterr().out)


def test_a_list_of_requests_is_a_list_of_answers(model: slipway.Model) -> None:
    request = model.example()
    answer = model.predict(request)
    assert model.predict([request]) == [answer]
    three = model.predict([request] * 3)
    assert len(three) == 3
    for each in three:
        assert each.keys() == answer.keys()


def test_other_targets_answer_alike(exports: Exports, tmp_path: Path, model: slipway.Model) -> None:
    assert exports.cells("policy_gru", ["torch"])["torch"]["status"] == "ok"
    folder = exports.folder / "policy_gru" / "repository"
    inputs = drawn(model, batch=2)
    with slipway.load("policy_gru", repository=folder, target="torch", threads=2) as other:
        assert other.artifact.target == "torch"
        got = other.run(inputs)
    for name, want in model.run(inputs).items():
        np.testing.assert_allclose(got[name], want, atol=1e-4)


def test_arrays_run_from_a_zero_state_or_from_the_given_one(gru_repository: Path, model: slipway.Model) -> None:
    inputs = drawn(model, batch=2)
    first = model.run(inputs)
    assert first.keys() == {tensor.name for tensor in model.signature.outputs}
    zero = model.signature.zero_state(2)
    for name, array in model.run({**inputs, **zero}).items():
        np.testing.assert_array_equal(array, first[name])
    state = {source: first[result] for source, result in model.signature.state}
    assert any(not np.array_equal(array, first[name]) for name, array in model.run({**inputs, **state}).items())
    with open_runtime(find(gru_repository, "policy_gru_onnx")) as runtime:
        for name, array in runtime.fresh(inputs).items():
            np.testing.assert_array_equal(array, first[name])


def test_a_stream_is_the_same_steps_with_the_state_by_hand(model: slipway.Model) -> None:
    stream = model.stream(batch=2)
    state = model.signature.zero_state(2)
    for seed in range(4):
        inputs = drawn(model, seed, batch=2)
        streamed = stream.step(inputs)
        by_hand = model.run({**inputs, **state})
        state = {source: by_hand.pop(result) for source, result in model.signature.state}
        assert streamed.keys() == by_hand.keys()
        for name, array in by_hand.items():
            np.testing.assert_array_equal(streamed[name], array)


def test_a_model_knows_its_manifest_and_signature(gru_repository: Path, model: slipway.Model) -> None:
    artifact = Artifact.load(find(gru_repository, "policy_gru_onnx"))
    assert model.artifact == artifact
    assert model.signature == artifact.signature
    assert model.schema()["type"] == "object"
    assert repr(model) == "<slipway.Model policy_gru_onnx>"


def test_a_closed_model_refuses_every_call(gru_repository: Path) -> None:
    model = slipway.load("policy_gru", repository=str(gru_repository))
    request, inputs = model.example(), drawn(model)
    model.predict(request)
    model.close()
    model.close()
    for call in (lambda: model.predict(request), lambda: model.run(inputs), model.stream, model.__enter__):
        with pytest.raises(InputError, match="expected an open model, found policy_gru_onnx closed; load it again"):
            call()
    assert "closed" in repr(model)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"model": "policy_gur"}, "policy_gur_onnx"),
        ({"model": "../policy_gru"}, "expected a name of letters"),
        ({"target": "tensorrt"}, "policy_gru_tensorrt"),
        ({"precision": "int8"}, "policy_gru_onnx_int8"),
        ({"repository": "/nothing"}, "/nothing"),
        ({"device": "tpu"}, "device: expected one of cpu, cuda, found 'tpu'"),
        ({"threads": 0}, "threads: expected an integer of 1 or more, found 0"),
        ({"threads": 1.5}, "threads: expected an integer of 1 or more, found 1.5"),
    ],
)
def test_what_cannot_be_loaded_is_an_input_error(gru_repository: Path, options: dict[str, Any], error: str) -> None:
    arguments = {"model": "policy_gru", "repository": gru_repository, **options}
    with pytest.raises(InputError, match=error):
        slipway.load(**arguments)


def test_a_changed_file_is_refused_unless_it_is_not_verified(exports: Exports, tmp_path: Path) -> None:
    repository = exports.onnx(tmp_path / "model_repository", "policy_gru")
    config = next(find(repository, "policy_gru_onnx").glob("*.onnx"))
    config.write_bytes(config.read_bytes() + b" ")
    with pytest.raises(ArtifactError, match="expected sha256"):
        slipway.load("policy_gru", repository=repository)


def test_wrong_requests_and_arrays_are_input_errors(model: slipway.Model) -> None:
    with pytest.raises(InputError):
        model.predict({"nothing": 1})
    with pytest.raises(InputError, match="expected at least one request, found none"):
        model.predict([])
    inputs = drawn(model)
    name, array = next((name, array) for name, array in inputs.items() if array.dtype.kind == "f")
    with pytest.raises(InputError, match="expected finite numbers"):
        model.run({**inputs, name: np.full_like(array, np.nan)})
    with pytest.raises(InputError, match="expected dtype"):
        model.run({**inputs, name: array.astype("float64")})
    with pytest.raises(InputError, match="found"):
        model.run({})
    too_many = model.signature.axis("batch").max + 1
    with pytest.raises(InputError, match=f"batch: expected 1..{too_many - 1}, found {too_many}"):
        model.stream(too_many)
    with pytest.raises(InputError, match="batch"):
        model.predict([model.example()] * too_many)


def test_a_model_without_state_has_no_stream(statements_repository: Path) -> None:
    with slipway.load("statements", repository=statements_repository) as model:
        assert model.predict(model.example())
        with pytest.raises(InputError, match="expected a recurrent model, found statements_onnx, which has no state"):
            model.stream()


def test_every_error_of_load_is_one_line(gru_repository: Path) -> None:
    with pytest.raises(SlipwayError) as caught:
        slipway.load("nothing", repository=gru_repository)
    assert "\n" not in str(caught.value)


def test_the_module_has_what_it_lists_and_no_more() -> None:
    assert dir(slipway) == ["Model", "__version__", "load"]
    assert slipway.load.__module__ == "slipway.model"
    with pytest.raises(AttributeError, match="module 'slipway' has no attribute 'nothing'"):
        slipway.nothing  # noqa: B018
