"""TensorRT: TensorRT-RTX builds real engines without a GPU; what needs a GPU is not reported as run."""

import json
import os
import sys
from pathlib import Path

import pytest
from onnx import TensorProto, helper, save

from export.targets.tensorrt import build, check_network, choose_builder
from runtimes.engines.tensorrt import FULL, RTX
from runtimes.errors import ArtifactError, EngineError, MissingPackage
from runtimes.host.gpu import gpu
from runtimes.tensors import Axis, Signature, TensorSpec

trt = pytest.importorskip(RTX, reason="TensorRT-RTX is not installed")
AXES = (Axis(name="batch", min=1, opt=2, max=8),)
ROOT = Path(__file__).parents[2]
FACTS = Path(os.environ.get("SLIPWAY_DATA", ROOT.parent / "shared" / "data")).parent / "facts" / "tensorrt_api"


def square(size: int = 4) -> Signature:
    shape = ("batch", size, size)
    return Signature(
        inputs=(TensorSpec(name="x", dtype="float32", shape=shape),),
        outputs=(TensorSpec(name="y", dtype="float32", shape=shape),),
        axes=AXES,
    )


def graph_of(operator: str, path: Path, size: int = 4) -> Path:
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", size, size])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None if operator == "Det" else ["batch", 4, 4])]
    node = helper.make_node(operator, ["x"], ["y"])
    save(helper.make_model(helper.make_graph([node], "toy", inputs, outputs), opset_imports=[opset()]), path)
    return path


def opset() -> object:
    return helper.make_opsetid("", 20)


def test_an_engine_is_built_without_a_gpu(tmp_path: Path) -> None:
    plan = build(RTX, graph_of("Relu", tmp_path / "relu.onnx"), square())
    assert len(plan) > 1000


def test_what_the_parser_refuses_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="Det") as caught:
        build(RTX, graph_of("Det", tmp_path / "det.onnx"), square())
    assert "\n" not in str(caught.value)


def test_a_graph_of_other_shapes_than_the_signature_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"expected .* found"):
        build(RTX, graph_of("Relu", tmp_path / "relu.onnx"), square(5))


def test_a_missing_tensor_is_noticed(tmp_path: Path) -> None:
    network = trt.Builder(trt.Logger(trt.Logger.ERROR)).create_network(0)
    with pytest.raises(ArtifactError, match=r"'[xy]'"):
        check_network(trt, network, square())


def test_the_builder_is_nvidias_only_where_it_could_run() -> None:
    assert choose_builder() == RTX or gpu()


NAMES = {
    "Builder": ("create_network", "create_builder_config", "create_optimization_profile", "build_serialized_network"),
    "OnnxParser": ("parse_from_file", "num_errors", "get_error"),
    "IBuilderConfig": ("add_optimization_profile", "clear_flag"),
    "IOptimizationProfile": ("set_shape",),
    "NetworkDefinitionCreationFlag": ("STRONGLY_TYPED",),
    "BuilderFlag": ("TF32",),
    "Runtime": ("deserialize_cuda_engine",),
    "ICudaEngine": ("create_execution_context",),
    "IExecutionContext": ("set_input_shape", "set_tensor_address", "get_tensor_shape", "execute_async_v3"),
}


@pytest.mark.parametrize("kind", sorted(NAMES))
def test_every_name_we_call_is_in_tensorrt_rtx(kind: str) -> None:
    assert [name for name in NAMES[kind] if not hasattr(getattr(trt, kind), name)] == []


@pytest.mark.parametrize("kind", sorted(NAMES))
def test_every_name_we_call_is_in_the_recorded_surface_of_tensorrt_11(kind: str) -> None:
    recorded = FACTS / "api-11.4.0.106.json"
    if not recorded.is_file():
        pytest.skip(f"no record of the API at {recorded}")
    surface = json.loads(recorded.read_text())
    assert set(NAMES[kind]) <= set(surface[kind])


@pytest.mark.gpu
@pytest.mark.skipif(gpu() is None, reason="no NVIDIA GPU here")
def test_the_builder_on_a_gpu_is_nvidias_where_installed() -> None:
    pytest.importorskip(FULL)
    assert choose_builder() == FULL


def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, RTX, None)
    with pytest.raises(MissingPackage, match=r"pip install '\.\[tensorrt-rtx\]'"):
        build(RTX, tmp_path / "any.onnx", square())
