"""Lowering to ONNX: each trap of the exporter that was met has a test that would see it again."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from export.lowering import check_onnx, name_axes, write_onnx
from export.source import OPERATOR, Source
from export.targets.torch import tidy
from runtimes.errors import ParityError
from runtimes.tensors import Axis, Signature, TensorSpec
from tests.conftest import write_untrained
from training.checkpoint import Checkpoint
from training.layers.scan import Form, selective_scan
from training.spec import Interface, ModelSpec, Parity, Tolerance, find_spec

SIGNATURE = Signature(
    inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", "time", 4)),),
    outputs=(TensorSpec(name="embedding_out", dtype="float32", shape=("batch", "time", 4)),),
    axes=(Axis(name="batch", min=1, opt=2, max=8), Axis(name="time", min=1, opt=6, max=64)),
)


class OfModule(Source):
    """A source whose module is given instead of restored."""

    def __init__(self, module: nn.Module, signature: Signature = SIGNATURE) -> None:
        spec = ModelSpec(
            name="toy",
            pipeline="none",
            presets={"tiny": {}},
            interface=Interface(signature=lambda config: signature, build=lambda config: module),
            parity=Parity(
                draw_inputs=lambda config, rng, sizes, sample_inputs: {
                    tensor.name: rng.normal(size=tensor.resolve(sizes)).astype(tensor.dtype)
                    for tensor in signature.free_inputs
                },
                agreement=lambda got, want, tolerance: {},
                tolerance={"fp32": Tolerance(absolute=1e-5, relative=1e-5)},
            ),
        )
        self.spec, self.signature, self.config = spec, signature, {}
        self._programs, self.onnx_programs = {}, {}
        self.module = module.eval().requires_grad_(False)
        self.sample_inputs = {}


def run_onnx(path: Path, **inputs: np.ndarray) -> np.ndarray:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, inputs)[0]


class Folded(nn.Module):
    """Two large parameters that are only read through a product, and one that is read as it is and turned."""

    def __init__(self) -> None:
        super().__init__()
        self.few, self.many = nn.Parameter(torch.randn(4, 3000)), nn.Parameter(torch.randn(3000, 3000) / 3000)
        self.tied = nn.Parameter(torch.randn(3000, 4) / 3000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.few @ self.many) @ self.tied + torch.tanh(x @ self.tied.T @ self.tied)


def test_what_parameters_alone_decide_is_computed_ahead_and_nothing_is_stored_twice(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    source = OfModule(Folded())
    write_onnx(source, Form(kind="loop"), "fp32", path)
    stored = [list(tensor.dims) for tensor in onnx.load(path).graph.initializer if np.prod(tensor.dims) > 100]
    assert sorted(stored) == [[4, 3000], [3000, 4]]
    inputs = source.draw_inputs(np.random.default_rng(0), {"batch": 2, "time": 3})
    want = source.answer(inputs)["embedding_out"]
    np.testing.assert_allclose(run_onnx(path, **inputs), want, atol=1e-5)


class Softmax(nn.Module):
    """Shares of a sum that may be zero, guarded in one of two ways."""

    def __init__(self, guard: str) -> None:
        super().__init__()
        self.guard = guard

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = x.abs().sum(-1, keepdim=True)
        return x / (total.clamp_min(1e-16) if self.guard == "clamp" else total + 1e-16)


def test_a_tiny_addend_is_deleted_by_the_exporter_and_a_clamp_is_not(tmp_path: Path) -> None:
    zeros = np.zeros((1, 1, 4), np.float32)
    for guard, finite in (("clamp", True), ("add", False)):
        path = tmp_path / f"{guard}.onnx"
        write_onnx(OfModule(Softmax(guard)), Form(kind="loop"), "fp32", path)
        assert np.isfinite(run_onnx(path, x=zeros)).all() == finite, f"{guard}: rewrite the models that clamp for this"


def test_softplus_is_one_operator_and_right_far_from_zero(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    write_onnx(OfModule(nn.Softplus()), Form(kind="operator"), "fp32", path)
    assert [node.op_type for node in onnx.load(path).graph.node] == ["Softplus"]
    x = np.linspace(-120, 120, 8 * 64 * 4, dtype=np.float32).reshape(8, 64, 4)
    want = nn.functional.softplus(torch.from_numpy(x).double(), threshold=1e9)
    np.testing.assert_allclose(run_onnx(path, x=x), want, rtol=1e-6, atol=1e-30)


def test_no_path_of_the_machine_that_exported_is_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    write_onnx(OfModule(Softmax("clamp")), Form(kind="loop"), "fp32", path)
    written = path.read_bytes()
    assert b"name_scopes" in written, "what tells parts of a module apart stays"
    assert b".py" not in written
    assert str(Path.cwd()).encode() not in written


class Frozen(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.ones(x.shape[1], 1).cumsum(0) if x.shape[1] == 6 else x


def test_an_axis_that_the_model_freezes_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises((ParityError, torch._dynamo.exc.UserError)):
        write_onnx(OfModule(Frozen()), Form(kind="loop"), "fp32", tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def toy_model(dims: list[object]) -> onnx.ModelProto:
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name in ("x", "embedding_out")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["embedding_out"])], "toy", value[:1], value[1:])
    return helper.make_model(graph)


@pytest.mark.parametrize("dims", [["s1", 6, 4], [2, "s2", 4], ["s1", "s1", 4]])
def test_a_dimension_that_is_fixed_or_shared_is_a_frozen_axis(dims: list[object]) -> None:
    with pytest.raises(ParityError, match="stay dynamic"):
        name_axes(toy_model(dims), SIGNATURE)


def test_dimensions_get_the_names_of_their_axes() -> None:
    model = toy_model(["s1", "s2", 4])
    name_axes(model, SIGNATURE)
    for value in (*model.graph.input, *model.graph.output):
        assert [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] == ["batch", "time", 4]


def test_an_output_named_like_an_inner_value_does_not_pass_the_checker(tmp_path: Path) -> None:
    model = toy_model(["batch", "time", 4])
    model.graph.node.append(helper.make_node("Neg", ["x"], ["embedding_out"]))
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ParityError, match="valid ONNX"):
        check_onnx(tmp_path / "model.onnx")


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.cell = kind(4, 4, num_layers=2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from training.layers.rnn import run_cell

        zero = torch.zeros(2, x.shape[0], 4, dtype=x.dtype)
        # The reshape would bake in the traced length if the cell's output had lost its dynamic axis.
        return run_cell(self.cell, x, (zero, zero) if isinstance(self.cell, nn.LSTM) else (zero,))[0].reshape(x.shape)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_cell_keeps_its_time_axis_and_becomes_one_operator_a_layer(kind: type, tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = OfModule(Recurrent(kind))
    path = tmp_path / "model.onnx"
    write_onnx(source, Form(kind="loop"), "fp32", path)
    names = [node.op_type for node in onnx.load(path).graph.node]
    assert names.count(kind.__name__) == 2
    for batch, time in ((1, 1), (3, 17), (8, 64)):
        x = np.random.default_rng(0).normal(size=(batch, time, 4)).astype(np.float32)
        np.testing.assert_allclose(run_onnx(path, x=x), source.answer({"x": x})["embedding_out"], atol=1e-5)


def test_half_precision_parameters_are_half_in_the_file(tmp_path: Path) -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.dense(x.to(self.dense.weight.dtype)).float()

    path = tmp_path / "model.onnx"
    write_onnx(OfModule(Dense()), Form(kind="loop"), "fp16", path)
    weights = [tensor.data_type for tensor in onnx.load(path).graph.initializer if len(tensor.dims) == 2]
    assert weights == [TensorProto.FLOAT16]


class Scanned(nn.Module):
    """A recurrence that has several forms."""

    def forward(self, x_BTD: torch.Tensor) -> tuple[torch.Tensor]:
        ones_BT1, state_BD1 = torch.ones_like(x_BTD[..., :1]), torch.zeros_like(x_BTD[:, 0, :, None])
        return (selective_scan(x_BTD, x_BTD.exp(), -torch.ones(4, 1), ones_BT1, ones_BT1, state_BD1)[0],)


@pytest.mark.parametrize(("module", "alike"), [(nn.Softmax(-1), True), (Scanned(), False)])
def test_a_module_is_traced_again_for_another_form_only_if_it_has_a_recurrence(module: nn.Module, alike: bool) -> None:
    source = OfModule(module)
    program = source.program(OPERATOR, "fp32")
    assert source.program(OPERATOR, "fp32") is program
    assert (source.program(Form(kind="doubling", length=64), "fp32") is program) is alike


def test_a_recurrence_is_traced_in_one_precision_after_another(tmp_path: Path) -> None:
    spec = find_spec("policy_mamba")
    write_untrained(spec, tmp_path / "policy_mamba", {})
    source = Source(spec, Checkpoint.load(tmp_path / "policy_mamba"))
    outputs = [source.program(OPERATOR, precision).graph_signature.user_outputs for precision in ("fp32", "fp16")]
    assert len(outputs[0]) == len(outputs[1]) == len(source.signature.outputs)


def test_a_program_is_written_alike_before_and_after_other_targets(tmp_path: Path) -> None:
    source = OfModule(Recurrent(nn.LSTM))
    for name in ("first", "second"):
        write_onnx(source, OPERATOR, "fp32", tmp_path / name)
        tidy(source.program(OPERATOR, "fp32"))
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    write_onnx(OfModule(Recurrent(nn.LSTM)), OPERATOR, "fp32", tmp_path / "other")
    assert (tmp_path / "other").read_bytes() != (tmp_path / "first").read_bytes(), "other weights"
