"""Every form of the recurrence says what a loop over time in float64 says, from any state, in any pieces."""

import math
import sys
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from training.layers import scan
from training.layers.form import Form, current_form, scan_form
from training.layers.scan import decayed_step, decayed_sums, selective_scan

B, D, N = 3, 6, 16
TIMES = (1, 2, 7, 30, 100)
FORMS = {
    "loop": Form(kind="loop"),
    "doubling": Form(kind="doubling"),
    "doubling beyond the time": Form(kind="doubling", length=130),
    "doubling at just the time": Form(kind="doubling", length=100),
    "kernel": Form(kind="kernel"),
}
Arrays = dict[str, np.ndarray]


def inputs(time: int, seed: int = 0, batch: int = B) -> Arrays:
    """Arguments in the ranges that a Mamba layer has: steps around 1e-3 to 1, A from -1 to -16, a state of size 2."""
    rng = np.random.default_rng(seed)
    return {
        "x": rng.normal(size=(batch, time, D)),
        "step": np.exp(rng.uniform(math.log(1e-3), 0, (batch, time, D))),
        "A": -np.exp(rng.uniform(0, math.log(16), (D, N))),
        "in": rng.normal(size=(batch, time, N)),
        "out": rng.normal(size=(batch, time, N)),
        "state": rng.normal(0, 2, (batch, D, N)),
    }


def reference(arrays: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """Equation 2 of the paper, channel by channel: y [B, T, D] and the last state [B, D, N] in float64."""
    batch, time, _ = arrays["x"].shape
    y, last = np.zeros((batch, time, D)), arrays["state"].copy()
    for b in range(batch):
        for d in range(D):
            for t in range(time):
                decay = np.exp(arrays["step"][b, t, d] * arrays["A"][d])
                last[b, d] = decay * last[b, d] + arrays["step"][b, t, d] * arrays["in"][b, t] * arrays["x"][b, t, d]
                y[b, t, d] = arrays["out"][b, t] @ last[b, d]
    return y, last


def tensors(arrays: Arrays, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.from_numpy(array).to(dtype) for array in arrays.values()]


def kernel_from_zero(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Any:
    """The contract of mamba_ssm's selective_scan_fn for u, delta [B, D, T], A [D, N], B, C [B, N, T]; state from 0."""
    assert all(tensor.is_contiguous() for tensor in (u, delta, B, C))
    assert B.shape == (u.shape[0], A.shape[1], u.shape[2])
    assert A.dtype == torch.float32, "the kernel takes nothing else"
    A, state, outputs = A.to(u.dtype), u.new_zeros(u.shape[0], *A.shape), []
    for t in range(u.shape[2]):
        state = torch.exp(delta[:, :, t, None] * A) * state + (delta * u)[:, :, t, None] * B[:, None, :, t]
        outputs.append(torch.einsum("bdn,bn->bd", state, C[:, :, t]))
    y = torch.stack(outputs, -1)
    return (y, state) if return_last_state else y


@pytest.fixture(autouse=True)
def mamba_ssm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package mamba_ssm whose kernel is plain torch."""
    interface = ModuleType("mamba_ssm.ops.selective_scan_interface")
    interface.selective_scan_fn = kernel_from_zero  # type: ignore[attr-defined]
    for name, module in (("mamba_ssm", ModuleType("mamba_ssm")), ("mamba_ssm.ops", ModuleType("mamba_ssm.ops"))):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, interface.__name__, interface)


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_says_what_a_loop_in_numpy_says(form: Form, time: int) -> None:
    arrays = inputs(time)
    want_y, want_state = reference(arrays)
    with scan_form(form):
        y, state = selective_scan(*tensors(arrays))
    # the kernel takes A in float32 whatever the rest is
    tolerance = 1e-5 if form.kind == "kernel" else 1e-11
    np.testing.assert_allclose(y, want_y, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(state, want_state, rtol=tolerance, atol=tolerance)


def test_doubling_for_a_shorter_time_than_the_sequence_is_wrong() -> None:
    arrays = inputs(100)
    with scan_form(Form(kind="doubling", length=30)):
        y, _ = selective_scan(*tensors(arrays))
    assert np.abs(y.numpy() - reference(arrays)[0]).max() > 1e-2


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_state_of_zero_and_one_carried_differ(form: Form) -> None:
    arrays = inputs(7)
    with scan_form(form):
        carried, _ = selective_scan(*tensors(arrays))
        fresh, _ = selective_scan(*tensors({**arrays, "state": np.zeros_like(arrays["state"])}))
    assert (carried - fresh).abs().max() > 0.1


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_three_thousand_steps_in_pieces_stay_with_the_loop_in_float64(form: Form) -> None:
    arrays = inputs(3000, batch=1)
    arrays["step"] *= 0.01  # memory of hundreds of steps, so that errors have time to add up
    want_y, want_state = reference(arrays)
    x, step, A, in_, out, state = tensors(arrays, torch.float32)
    pieces, start = [], 0
    for size in (1, 100, 7, 100, 30, *[100] * 27, 62):
        span = slice(start, start + size)
        with scan_form(form):
            y, state = selective_scan(x[:, span], step[:, span], A, in_[:, span], out[:, span], state)
        pieces.append(y)
        start += size
    y = torch.cat(pieces, 1).numpy()
    assert y.shape == want_y.shape
    assert np.abs(y - want_y).max() < 2e-5 * np.abs(want_y).max()
    assert np.abs(state.numpy() - want_state).max() < 2e-5 * np.abs(want_state).max()


def gradients(form: Form, time: int) -> list[Tensor]:
    """Gradients of a sum over the outputs and the last state in every argument."""
    arguments = [tensor.requires_grad_() for tensor in tensors(inputs(time))]
    with scan_form(form):
        y, state = selective_scan(*arguments)
    rng = np.random.default_rng(1)
    weights = torch.from_numpy(rng.normal(size=y.shape)), torch.from_numpy(rng.normal(size=state.shape))
    return list(torch.autograd.grad((y * weights[0]).sum() + (state * weights[1]).sum(), arguments))


@pytest.mark.parametrize("time", [1, 2, 7, 30])
@pytest.mark.parametrize("name", [name for name in FORMS if name not in ("loop", "kernel")])
def test_gradients_are_those_of_the_loop(name: str, time: int) -> None:
    for got, want in zip(gradients(FORMS[name], time), gradients(FORMS["loop"], time), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_the_gradient_of_the_loop_is_that_of_finite_differences() -> None:
    arguments = tuple(tensor.requires_grad_() for tensor in tensors(inputs(4, batch=1)))
    with scan_form(Form(kind="loop")):
        assert torch.autograd.gradcheck(selective_scan, arguments)


class Scan(nn.Module):
    """The recurrence and nothing else."""

    def forward(self, *arguments: Tensor) -> tuple[Tensor, Tensor]:
        return selective_scan(*arguments)


@pytest.fixture(scope="module", params=["operator", "doubling"])
def session(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> onnxruntime.InferenceSession:
    """The traced recurrence in ONNX Runtime, with dynamic batch and time."""
    path = tmp_path_factory.mktemp("scan") / "scan.onnx"
    form = Form(kind=request.param, length=128 if request.param == "doubling" else None)
    batch, time = torch.export.Dim("batch", min=1, max=8), torch.export.Dim("time", min=1, max=128)
    moving = {0: batch, 1: time}
    dims = (moving, moving, None, moving, moving, {0: batch})
    with torch.no_grad(), scan_form(form):
        program = torch.export.export(
            Scan(), tuple(tensors(inputs(5), torch.float32)), dynamic_shapes=(dims,), strict=False
        )
        exported = torch.onnx.export(program, dynamo=True, opset_version=20, verbose=False)
    assert exported is not None
    exported.save(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_the_traced_recurrence_says_what_a_loop_in_numpy_says(
    session: onnxruntime.InferenceSession, time: int, batch: int
) -> None:
    arrays = inputs(time, seed=time, batch=batch)
    names = [value.name for value in session.get_inputs()]
    named = {name: array.astype(np.float32) for name, array in zip(names, arrays.values(), strict=True)}
    y, state = session.run(None, named)
    want_y, want_state = reference({name: array.astype(np.float32) for name, array in arrays.items()})
    np.testing.assert_allclose(y, want_y, rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(state, want_state, rtol=1e-4, atol=2e-5)


def test_a_form_holds_inside_its_block_only() -> None:
    with scan_form(Form(kind="doubling")):
        with scan_form(Form(kind="kernel")):
            assert current_form() == Form(kind="kernel")
        assert current_form() == Form(kind="doubling")
    assert current_form() is None


def test_a_block_tells_whether_a_recurrence_heeded_its_form() -> None:
    with scan_form(Form(kind="loop")) as outer:
        torch.zeros(2).cumsum(0)
        with scan_form(Form(kind="loop")) as inner:
            selective_scan(*tensors(inputs(3)))
    assert (outer.paid, inner.paid) == (False, True)


def test_a_form_ends_with_its_block_also_when_that_fails() -> None:
    def fail() -> None:
        with scan_form(Form(kind="doubling")):
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fail()
    assert current_form() is None


def test_without_a_gpu_the_loop_is_the_form_though_the_kernel_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(scan, "_loop", lambda *arguments: called.append("loop"))
    monkeypatch.setattr(scan, "_kernel", lambda *arguments: called.append("kernel"))
    selective_scan(*tensors(inputs(2)))
    assert called == ["loop"]


HEADS, P = 2, 5
DECAYED_FORMS = {"pieces": None, "one piece": Form(kind="operator"), "TensorRT": Form(kind="doubling"), **FORMS}


def decayed_inputs(time: int, strength: float) -> Arrays:
    rng = np.random.default_rng(0)
    return {
        "x": rng.normal(size=(B, time, HEADS, P)),
        "decay": -strength * rng.uniform(size=(B, time, HEADS)) ** 4,
        "in": rng.normal(size=(B, time, N)),
        "out": rng.normal(size=(B, time, N)),
        "state": rng.normal(0, 2, (B, HEADS, P, N)),
    }


def decayed_reference(arrays: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """y [B, T, H, P] and the last state [B, H, P, N] in float64, position by position and head by head."""
    y, last = np.zeros_like(arrays["x"]), arrays["state"].copy()
    for b, t, h in np.ndindex(arrays["decay"].shape):
        added = np.outer(arrays["x"][b, t, h], arrays["in"][b, t])
        last[b, h] = np.exp(arrays["decay"][b, t, h]) * last[b, h] + added
        y[b, t, h] = last[b, h] @ arrays["out"][b, t]
    return y, last


@pytest.mark.parametrize("form", DECAYED_FORMS.values(), ids=DECAYED_FORMS)
@pytest.mark.parametrize("strength", [0.3, 30.0])
@pytest.mark.parametrize("time", [1, 63, 64, 200])
def test_decayed_sums_are_their_loop(form: Form | None, strength: float, time: int) -> None:
    """Also in float32 behind strong decays, which a difference of sums from the start would lose to rounding."""
    arrays = decayed_inputs(time, strength)
    want = decayed_reference(arrays)
    with scan_form(form) if form else nullcontext():
        got = decayed_sums(*tensors(arrays, torch.float32))
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one.numpy(), other, atol=3e-5)


def test_decayed_sums_go_on_from_a_state_and_step_by_step() -> None:
    x, decay, into, out, state = tensors(decayed_inputs(100, 1.0))
    y, last = decayed_sums(x, decay, into, out, state)
    _, half = decayed_sums(x[:, :37], decay[:, :37], into[:, :37], out[:, :37], state)
    torch.testing.assert_close(decayed_sums(x[:, 37:], decay[:, 37:], into[:, 37:], out[:, 37:], half)[0], y[:, 37:])
    for t in range(100):
        y_now, state = decayed_step(x[:, t], decay[:, t], into[:, t], out[:, t], state)
        torch.testing.assert_close(y_now, y[:, t])
    torch.testing.assert_close(state, last)
