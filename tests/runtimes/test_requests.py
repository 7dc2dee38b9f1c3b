"""A wrong request is an InputError in every pipeline, and the schema accepts every valid one."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtimes.errors import EngineError, InputError
from runtimes.pipeline import REQUEST_BYTES, Pipeline, find_pipeline, parse_request, write_answer
from tests.wrong_requests import VALUES, nearly
from training.checkpoint import Checkpoint
from training.spec import ModelSpec, all_specs

jsonschema = pytest.importorskip("jsonschema")

SPECS = all_specs()
# One of the policies speaks for all: they share a pipeline.
NAMES = [name for name in SPECS if not name.startswith("policy_") or name == "policy_gru"]


def open_one(spec: ModelSpec, checkpoints: Path) -> Pipeline:
    checkpoint = Checkpoint.load(checkpoints / spec.checkpoint)
    if reason := spec.interface.absent(checkpoint.config):
        pytest.skip(reason)
    pipeline = find_pipeline(spec.pipeline)
    return pipeline(checkpoint.config, checkpoint.assets)


@pytest.fixture(params=NAMES)
def pipeline(request: pytest.FixtureRequest, checkpoints: Path) -> Pipeline:
    return open_one(SPECS[request.param], checkpoints)


@pytest.fixture
def schema(pipeline: Pipeline) -> Any:
    jsonschema.Draft202012Validator.check_schema(pipeline.schema())
    return jsonschema.Draft202012Validator(pipeline.schema())


def test_the_schema_knows_the_example_and_no_other_field(pipeline: Pipeline, schema: Any) -> None:
    example = pipeline.example()
    assert schema.is_valid(example)
    assert not schema.is_valid({**example, "unheard_of": 1})
    assert not schema.is_valid({})
    assert not schema.is_valid([example])


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_a_request_is_right_and_satisfies_the_schema_or_is_an_input_error(
    pipeline: Pipeline, schema: Any, data: st.DataObject
) -> None:
    request = data.draw(nearly(pipeline.example()) | VALUES)
    try:
        tensors = pipeline.encode([request])
    except InputError:
        return
    assert all(isinstance(array, np.ndarray) and len(array) == 1 for array in tensors.values())
    assert schema.is_valid(request), request


def test_a_request_that_is_no_json_in_utf_8_is_an_input_error() -> None:
    for text in (b"", b"{", b"\xff", b'{"a": }', b"[" * 100_000):
        with pytest.raises(InputError, match="request 3: expected JSON in UTF-8, found "):
            parse_request(text, "request 3")
    with pytest.raises(
        InputError, match=f"expected at most {REQUEST_BYTES} bytes, found {REQUEST_BYTES + 1}; send less"
    ):
        parse_request(b" " * (REQUEST_BYTES + 1), "request 0")
    assert parse_request(b" " * (REQUEST_BYTES - 1) + b"1", "request 0") == 1


def test_an_answer_has_one_form_and_is_finite() -> None:
    assert write_answer({"స": [1.5, "é", True, 2**60]}) == '{"స": [1.5, "é", true, 1152921504606846976]}'.encode()
    third = 1 / 3
    assert write_answer([third]) == write_answer([np.nextafter(third, 1)]) == b"[0.3333333432674408]"
    for number in (math.nan, math.inf):
        with pytest.raises(EngineError, match="expected an answer of finite numbers"):
            write_answer({"score": number})
