"""Static int8: the scales lie in the file, nothing depends on the batch, and outliers cost no precision."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from export.lowering import quantize_weights, write_onnx
from export.quantization import static
from export.quantization.static import calibration_inputs, choose_scales, quantize_static, smoothing
from export.source import OPERATOR
from runtimes.errors import ParityError
from tests.export.test_lowering import SIGNATURE, OfModule, run_onnx

RNG = np.random.default_rng(0)
OUTLIER = 2  # a channel a hundred times as large as the others


class Layers(nn.Module):
    """Two products that read one activation, one of them with a bias, and a third behind them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.other, self.last = nn.Linear(4, 5), nn.Linear(4, 5, bias=False), nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.one(x) + self.other(x)))


class Rows(nn.Module):
    """A Linear on rows, which the exporter writes as Gemm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.reshape(-1, 4)).reshape(x.shape)


def inputs(count: int = 64) -> list[dict[str, np.ndarray]]:
    return [{"x": RNG.normal(size=(1, 6, 4)).astype(np.float32)} for _ in range(count)]


@pytest.fixture(params=[Layers, Rows])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    write_onnx(OfModule(request.param()), OPERATOR, "fp32", path)
    return path


def test_int8_is_close_to_the_float_model_and_smaller(model: Path) -> None:
    x = RNG.normal(size=(8, 16, 4)).astype(np.float32)
    want = run_onnx(model, x=x)
    quantize_static(model, inputs())
    error = np.abs(run_onnx(model, x=x) - want)
    assert 0 < error.mean() < 0.02, "two rounded factors of eight bits"


def test_an_answer_does_not_depend_on_its_batch_as_it_does_with_dynamic_scales(model: Path) -> None:
    x = RNG.normal(size=(8, 6, 4)).astype(np.float32)
    x[1:] *= 30

    def alone_and_in_company(path: Path) -> bool:
        return np.array_equal(run_onnx(path, x=x)[:1], run_onnx(path, x=x[:1]))

    dynamic = model.with_name("dynamic.onnx")
    dynamic.write_bytes(model.read_bytes())
    quantize_weights(dynamic)
    quantize_static(model, inputs())
    assert alone_and_in_company(model)
    assert not alone_and_in_company(dynamic)


def test_every_scale_is_a_constant_without_zero_point_and_every_quantized_value_has_one_reader(model: Path) -> None:
    quantize_static(model, inputs())
    graph = onnx.load(model).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    coders = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    for node in coders:
        scale, zero = (constants[name] for name in node.input[1:])
        assert zero.dtype == np.int8
        assert not zero.any()
        assert (scale > 0).all()
    for node in (node for node in coders if node.op_type == "QuantizeLinear"):
        assert sum(node.output[0] in other.input for other in graph.node) == 1


@pytest.mark.parametrize(("module", "products"), [(Layers, 2), (Rows, 1)])
def test_onnx_runtime_computes_in_int8_and_once_for_products_of_one_activation(
    module: type[nn.Module], products: int, tmp_path: Path
) -> None:
    path, optimized = tmp_path / "model.onnx", tmp_path / "optimized.onnx"
    write_onnx(OfModule(module()), OPERATOR, "fp32", path)
    quantize_static(path, inputs())
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(optimized)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(optimized).graph.node]
    assert kinds.count("MatMulIntegerToFloat") == products
    assert not {"MatMul", "Gemm", "FusedGemm"} & set(kinds)


def test_a_channel_that_sticks_out_is_moved_into_the_weights() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(500, 16)).astype(np.float32)
    rows[:, OUTLIER] *= 100
    weights = rng.normal(size=(16, 8)).astype(np.float32)
    seen = static.Observed(largest=np.abs(rows).max(0), rows=rows)
    scales = choose_scales(seen, weights)
    assert scales.smooth.argmax() == OUTLIER
    # The reference: one scale for the whole activation, and nothing moved.
    step = np.abs(rows).max() / 127
    plain = np.round(rows / step) * step @ weights
    int8 = np.round(rows / scales.smooth / scales.step) * scales.step @ (scales.weights * scales.steps) - scales.drift
    wanted = rows @ weights
    assert np.square(int8 - wanted).mean() < np.square(plain - wanted).mean() / 10


def test_smoothing_is_equation_4_of_smoothquant() -> None:
    largest, weights = np.array([1.0, 16.0]), np.array([4.0, 1.0])
    factors = largest**0.5 / weights**0.5
    np.testing.assert_allclose(smoothing(largest, weights, 0.5), factors / np.sqrt(factors.prod()), rtol=1e-6)


def test_the_mean_error_is_taken_off_the_bias(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    source = OfModule(Rows())
    write_onnx(source, OPERATOR, "fp32", path)
    x = (RNG.normal(size=(8, 64, 4)) + np.array([1, -2, 3, 0.5])).astype(np.float32)
    want = run_onnx(path, x=x)
    quantize_static(path, [{"x": row[None]} for row in np.concatenate(np.split(x, 8, 1))])
    error = run_onnx(path, x=x) - want
    assert np.abs(error.mean((0, 1))).max() < np.abs(error).mean() / 4


def test_weights_beyond_the_limit_of_protobuf_stay_in_a_file_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(static, "EXTERNAL_BYTES", 0)
    path = tmp_path / "model.onnx"
    write_onnx(OfModule(nn.Sequential(nn.Linear(4, 500), nn.Tanh(), nn.Linear(500, 4))), OPERATOR, "fp32", path)
    x = RNG.normal(size=(2, 6, 4)).astype(np.float32)
    want = run_onnx(path, x=x)
    quantize_static(path, inputs())
    assert {each.name for each in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
    np.testing.assert_allclose(run_onnx(path, x=x), want, atol=0.1)


class Nothing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


def test_a_model_without_constant_products_has_nothing_to_make_int8(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    write_onnx(OfModule(Nothing()), OPERATOR, "fp32", path)
    with pytest.raises(ParityError, match="expected products with constant matrices to make int8, found none"):
        quantize_static(path, inputs(2))


def test_nan_in_the_calibration_is_refused(model: Path) -> None:
    with pytest.raises(ParityError, match="expected finite activations"):
        quantize_static(model, [{"x": np.full((1, 6, 4), np.nan, np.float32)}])


def test_a_gemm_that_is_no_linear_is_refused(model: Path, tmp_path: Path) -> None:
    loaded = onnx.load(model)
    for node in loaded.graph.node:
        if node.op_type == "Gemm":
            node.attribute.append(onnx.helper.make_attribute("alpha", 2.0))
            onnx.save(loaded, model)
            with pytest.raises(ParityError, match="expected a Gemm as of a Linear"):
                quantize_static(model, inputs(2))


def test_calibration_takes_one_row_at_a_time_of_every_length() -> None:
    drawn = list(calibration_inputs(OfModule(Layers())))
    time = SIGNATURE.axis("time")
    assert len(drawn) == static.CALIBRATION_INPUTS
    assert {each["x"].shape[0] for each in drawn} == {1}
    assert {time.min, time.max} <= {each["x"].shape[1] for each in drawn}
