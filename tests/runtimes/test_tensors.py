"""The declaration of tensors refuses contradictions, and tensors that do not match it."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtimes.errors import ArtifactError, EngineError, InputError
from runtimes.tensors import DTYPES, Axis, Signature, TensorSpec, require_finite
from training.spec import ModelSpec, all_specs

BATCH = Axis(name="batch", min=1, opt=2, max=4)
TIME = Axis(name="time", min=2, opt=3, max=9)


def tensor(name: str, *shape: int | str, dtype: str = "float32") -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=("batch", *shape))


def signature(**changes: Any) -> Signature:
    """Frames and ids over a common time in, logits out, with a state of one float and one integer tensor."""
    state = [("carry", (3,), "float32"), ("seen", (1,), "int64")]
    parts = {
        "inputs": (
            tensor("frames", "time", 5),
            tensor("ids", "time", dtype="int64"),
            *(tensor(f"{name}_in", *shape, dtype=dtype) for name, shape, dtype in state),
        ),
        "outputs": (
            tensor("logits", "time", 2),
            *(tensor(f"{name}_out", *shape, dtype=dtype) for name, shape, dtype in state),
        ),
        "axes": (BATCH, TIME),
        "state": tuple((f"{name}_in", f"{name}_out") for name, _, _ in state),
    }
    return Signature(**{**parts, **changes})


def inputs(batch: int = 2, time: int = 3, **changes: Any) -> dict[str, Any]:
    arrays = {
        "frames": np.zeros((batch, time, 5), np.float32),
        "ids": np.zeros((batch, time), np.int64),
        "carry_in": np.zeros((batch, 3), np.float32),
        "seen_in": np.zeros((batch, 1), np.int64),
    }
    return {**arrays, **changes}


@pytest.mark.parametrize(
    ("low", "opt", "high"), [(0, 2, 4), (-1, 2, 4), (3, 2, 4), (1, 5, 4), (1, 1, 1), (1, 1, 4), (2, 4, 3)]
)
def test_an_axis_without_order_or_traced_at_one_is_refused(low: int, opt: int, high: int) -> None:
    with pytest.raises(ArtifactError, match=f"axis 'rows': expected .* found {low}, {opt}, {high}"):
        Axis(name="rows", min=low, opt=opt, max=high)


def test_an_axis_may_have_one_size_only() -> None:
    assert Axis(name="rows", min=2, opt=2, max=2).max == 2


@pytest.mark.parametrize("dtype", ["float64", "float", "string", ""])
def test_a_dtype_no_engine_shares_is_refused(dtype: str) -> None:
    with pytest.raises(ArtifactError, match=r"tensor 'x': expected a dtype of float32, .* found"):
        tensor("x", 3, dtype=dtype)


@pytest.mark.parametrize("shape", [(), (3,), ("time", 3), (3, "batch")])
def test_a_tensor_without_batch_in_front_is_refused(shape: tuple[int | str, ...]) -> None:
    with pytest.raises(ArtifactError, match="expected 'batch' as first axis"):
        TensorSpec(name="x", dtype="float32", shape=shape)


def test_two_tensors_of_one_name_are_refused() -> None:
    with pytest.raises(ArtifactError, match="distinct tensor names"):
        Signature(inputs=(tensor("x", 3),), outputs=(tensor("x", 3),), axes=(BATCH,))


@pytest.mark.parametrize("axes", [(BATCH,), (TIME,), (BATCH, TIME, Axis(name="length", min=1, opt=2, max=3)), ()])
def test_axes_that_the_shapes_do_not_use_or_lack_are_refused(axes: tuple[Axis, ...]) -> None:
    with pytest.raises(ArtifactError, match=r"expected axes \['batch', 'time'\]"):
        signature(axes=axes)


def test_an_axis_declared_twice_is_refused() -> None:
    with pytest.raises(ArtifactError, match="axes"):
        signature(axes=(BATCH, TIME, Axis(name="time", min=1, opt=2, max=3)))


@pytest.mark.parametrize(
    "pair",
    [
        ("carry_in", "seen_out"),  # another shape and dtype
        ("carry_in", "logits"),
        ("carry_in", "nothing"),
        ("nothing", "carry_out"),
        ("carry_out", "carry_in"),  # from an output to an input
        ("carry_in", "carry_in"),
    ],
)
def test_a_state_that_cannot_be_handed_on_is_refused(pair: tuple[str, str]) -> None:
    with pytest.raises(ArtifactError, match=f"state '{pair[0]}' -> '{pair[1]}'"):
        signature(state=(pair,))


def test_a_state_whose_dtype_changes_on_the_way_is_refused() -> None:
    outputs = (tensor("logits", "time", 2), tensor("carry_out", 3, dtype="float16"), tensor("seen_out", 1))
    with pytest.raises(ArtifactError, match="state 'carry_in' -> 'carry_out'"):
        signature(outputs=outputs)


def test_a_state_that_grows_with_time_is_refused_because_nothing_says_how_large_it_begins() -> None:
    inputs, outputs = (tensor("x", "time"), tensor("h_in", "time")), (tensor("h_out", "time"),)
    with pytest.raises(ArtifactError, match="state 'h_in' -> 'h_out'"):
        Signature(inputs=inputs, outputs=outputs, axes=(BATCH, TIME), state=(("h_in", "h_out"),))


def test_only_a_state_can_lie_where_its_next_lies() -> None:
    assert Signature.from_json(signature(in_place=("carry_in",)).to_json()).in_place == ("carry_in",)
    with pytest.raises(ArtifactError, match=r"in place: .* found x"):
        signature(in_place=("x",))


def test_right_feeds_give_the_size_of_every_axis() -> None:
    assert signature().check_inputs(inputs(batch=4, time=9)) == {"batch": 4, "time": 9}
    assert signature().check_inputs(inputs(batch=1, time=2)) == {"batch": 1, "time": 2}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"frames": np.zeros((2, 3, 5), np.float64)}, "input 'frames': expected dtype float32, found float64"),
        ({"ids": np.zeros((2, 3), np.int32)}, "input 'ids': expected dtype int64, found int32"),
        ({"frames": [[[0.0] * 5] * 3] * 2}, "input 'frames': expected dtype float32, found list"),
        ({"frames": np.zeros((2, 5), np.float32)}, r"expected shape \[batch, time, 5\], found \[2, 5\]"),
        ({"frames": np.zeros((2, 3, 6), np.float32)}, r"expected shape \[batch, time, 5\] .*found \[2, 3, 6\]"),
        ({"ids": np.zeros((2, 4), np.int64)}, r"input 'ids': expected .*time = 3.*found \[2, 4\]"),
        ({"carry_in": np.zeros((1, 3), np.float32)}, r"input 'carry_in': expected .*batch = 2.*found \[1, 3\]"),
        ({"carry_in": np.full((2, 3), np.nan, np.float32)}, "input 'carry_in': expected finite numbers"),
        ({"carry_in": np.full((2, 3), -np.inf, np.float32)}, "input 'carry_in': expected finite numbers"),
        ({"more": np.zeros(2, np.float32)}, "expected inputs frames, ids, carry_in, seen_in; found .*more"),
    ],
)
def test_a_wrong_feed_is_refused_by_name(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        signature().check_inputs(inputs(**wrong))


def test_one_nan_among_many_numbers_is_refused() -> None:
    frames = np.zeros((2, 3, 5), np.float32)
    frames[1, 2, 4] = np.nan
    with pytest.raises(InputError, match="input 'frames': expected finite numbers, found NaN or infinity"):
        signature().check_inputs(inputs(frames=frames))


def test_a_missing_feed_is_refused_and_so_are_none() -> None:
    arrays = inputs()
    del arrays["ids"]
    with pytest.raises(InputError, match="expected inputs frames, ids, carry_in, seen_in; found carry_in, frames"):
        signature().check_inputs(arrays)
    with pytest.raises(InputError, match="found none"):
        signature().check_inputs({})


@pytest.mark.parametrize(("batch", "time"), [(0, 3), (5, 3), (2, 1), (2, 10), (2, 0)])
def test_a_size_outside_of_its_axis_is_refused(batch: int, time: int) -> None:
    with pytest.raises(InputError, match=r"batch 1\.\.4, time 2\.\.9|batch = 2, time 2\.\.9"):
        signature().check_inputs(inputs(batch=batch, time=time))


def test_an_engine_that_answers_for_other_sizes_breaks_the_signature() -> None:
    sizes = {"batch": 2, "time": 3}
    outputs = {
        "logits": np.zeros((2, 3, 2), np.float32),
        "carry_out": np.zeros((2, 3), np.float32),
        "seen_out": np.zeros((2, 1), np.int64),
    }
    signature().check_outputs(outputs, sizes)
    for wrong in (
        {"logits": np.zeros((2, 4, 2), np.float32)},  # within the axis, but not what was asked
        {"logits": np.zeros((3, 3, 2), np.float32)},
        {"logits": np.zeros((2, 3, 2), np.float16)},
        {"more": np.zeros(2)},
    ):
        with pytest.raises(ArtifactError, match="the engine broke the signature"):
            signature().check_outputs({**outputs, **wrong}, sizes)
    assert sizes == {"batch": 2, "time": 3}


def test_what_a_caller_gives_and_gets_leaves_out_the_state() -> None:
    assert [tensor.name for tensor in signature().free_inputs] == ["frames", "ids"]
    assert [tensor.name for tensor in signature().visible_outputs] == ["logits"]


def test_zero_state_has_the_rows_and_dtypes_of_the_state_and_no_shared_memory() -> None:
    state = signature().zero_state(3)
    assert {name: (array.shape, array.dtype.name) for name, array in state.items()} == {
        "carry_in": ((3, 3), "float32"),
        "seen_in": ((3, 1), "int64"),
    }
    assert not any(array.any() for array in state.values())
    state["carry_in"][:] = 1
    assert not signature().zero_state(3)["carry_in"].any()


def test_a_signature_without_state_has_none() -> None:
    plain = Signature(inputs=(tensor("x", 3),), outputs=(tensor("y", 3),), axes=(BATCH,))
    assert plain.zero_state(2) == {}
    assert plain.free_inputs == plain.inputs


def test_json_keeps_all_of_a_signature() -> None:
    text = json.dumps(signature().to_json())
    assert Signature.from_json(json.loads(text)) == signature()
    assert Signature.from_json(json.loads(text)).axis("time") == TIME


@given(data=st.data())
def test_any_signature_survives_json(data: st.DataObject) -> None:
    size = st.one_of(st.integers(1, 9), st.just("time"))
    shapes = data.draw(st.lists(st.lists(size, max_size=3), min_size=2, max_size=6))
    tensors = [tensor(f"t{i}", *shape, dtype=data.draw(st.sampled_from(DTYPES))) for i, shape in enumerate(shapes)]
    axes = (BATCH, TIME) if any("time" in shape for shape in shapes) else (BATCH,)
    whole = Signature(inputs=tuple(tensors[:1]), outputs=tuple(tensors[1:]), axes=axes)
    assert Signature.from_json(json.loads(json.dumps(whole.to_json()))) == whole


@pytest.mark.parametrize("spec", all_specs().values(), ids=lambda spec: spec.name)
@pytest.mark.parametrize("bound", ["min", "opt", "max"])
def test_the_feeds_of_every_model_fit_its_signature(spec: ModelSpec, bound: Any) -> None:
    config = spec.preset("tiny")
    own = spec.interface.signature(config)
    sizes = own.sizes(bound)
    arrays = spec.parity.draw_inputs(config, np.random.default_rng(0), sizes, {})
    assert own.check_inputs({**arrays, **own.zero_state(sizes["batch"])}) == sizes


def test_a_signature_from_before_states_lay_in_place_is_read() -> None:
    signature = Signature(inputs=(), outputs=(), axes=(), state=())
    older = {name: value for name, value in signature.to_json().items() if name != "in_place"}
    assert Signature.from_json(older) == signature


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_outputs_that_are_not_finite_are_refused_by_name(wrong: float) -> None:
    right = {"ids": np.array([1, 2]), "real": np.ones(3, np.float16)}
    require_finite(right)
    with pytest.raises(EngineError, match="output 'scores': expected finite numbers, found NaN or infinity"):
        require_finite({**right, "scores": np.array([0.5, wrong], np.float32)})
