"""TensorRT from ONNX: NVIDIA's TensorRT where it is installed beside a GPU, else TensorRT-RTX ahead of time.

The code uses the interface that TensorRT 11.4 and TensorRT-RTX 1.7 share: strongly typed, precision in the graph.
Triton does not serve engines of TensorRT-RTX, for its `tensorrt_plan` reads those of NVIDIA's TensorRT. Without a GPU
an engine is built, not run.
"""

import importlib.util
from pathlib import Path
from typing import Any

from export.lowering import OPSET, write_onnx
from export.quantization.static import calibration_inputs, quantize_static
from export.source import Source
from export.target import Built, Target
from runtimes.engines.onnxruntime import MODEL_FILE
from runtimes.engines.tensorrt import FULL, PLAN_FILE, RTX, numpy_dtype
from runtimes.errors import ArtifactError, EngineError, one_line, require
from runtimes.host.gpu import gpu
from runtimes.tensors import Signature
from training.layers.form import Form

# The architectures that one RTX engine is built for: Ampere, Ada and Blackwell. Turing has no float32 matrix product;
# Hopper is not supported.
RTX_CAPABILITIES = ("SM80", "SM86", "SM89", "SM120")


def convert(source: Source, precision: str, out: Path) -> Built:
    """Write the engine, with one optimisation profile from the axes."""
    builder = choose_builder()
    longest = max((axis.max for axis in source.signature.axes if axis.name == "time"), default=1)
    onnx_path = out / MODEL_FILE  # kept with the engine: another machine can build its own from it
    # TensorRT runs ONNX Scan step by step; doubling is a few large operations.
    form = Form(kind="doubling", length=longest)
    write_onnx(source, form, "fp32" if precision == "int8" else precision, onnx_path)
    if precision == "int8":
        quantize_static(onnx_path, calibration_inputs(source), source.spec.export.fp32_modules)
    (out / PLAN_FILE).write_bytes(build(builder, onnx_path, source.signature))
    return Built(
        built_with={"opset": str(OPSET), "builder": builder, "gpu": _architectures(builder)},
        device="cuda",
        not_run_reason=_not_run_reason(builder),
        served=builder == FULL,
        proxy_engine="onnxruntime",
    )


def choose_builder() -> str:
    """The module that builds: NVIDIA's TensorRT if it is installed and there is a GPU, else TensorRT-RTX."""
    return FULL if gpu() and importlib.util.find_spec(FULL) else RTX


def build(builder: str, onnx_path: Path, signature: Signature) -> bytes:
    """The serialized engine; `EngineError` with the parser's messages if it cannot be built."""
    trt = require(builder, extra="tensorrt-rtx" if builder == RTX else "tensorrt")
    logger = trt.Logger(trt.Logger.ERROR)
    factory = trt.Builder(logger)
    network = factory.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx_path)):
        problems = [parser.get_error(i) for i in range(parser.num_errors)]
        raise EngineError(f"{builder} cannot parse the model: {one_line('; '.join(map(str, problems)))}")
    check_network(trt, network, signature)
    plan = factory.build_serialized_network(network, _configure(trt, factory, signature))
    if plan is None:
        raise EngineError(f"{builder} parsed the model but could not build it; the reason is in its log above")
    return bytes(plan)


def check_network(trt: Any, network: Any, signature: Signature) -> None:
    """`ArtifactError` unless the parsed network has the signature's tensors."""
    parsed = [network.get_input(i) for i in range(network.num_inputs)]
    parsed += [network.get_output(i) for i in range(network.num_outputs)]
    specs = (*signature.inputs, *signature.outputs)
    expected = {
        tensor.name: (tensor.dtype, tuple(-1 if isinstance(size, str) else size for size in tensor.shape))
        for tensor in specs
    }
    found = {tensor.name: (numpy_dtype(trt, tensor.dtype), tuple(tensor.shape)) for tensor in parsed}
    for name in expected.keys() | found.keys():
        if expected.get(name) != found.get(name):
            raise ArtifactError(f"TensorRT tensor '{name}': expected {expected.get(name)}, found {found.get(name)}")


def _configure(trt: Any, factory: Any, signature: Signature) -> Any:
    config = factory.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # fp32 means fp32; parity is held to it
    profile = factory.create_optimization_profile()
    for tensor in signature.inputs:
        shapes = (tensor.resolve(signature.sizes(bound)) for bound in ("min", "opt", "max"))
        profile.set_shape(tensor.name, *shapes)
    config.add_optimization_profile(profile)
    if hasattr(trt, "ComputeCapability"):  # TensorRT-RTX only
        config.num_compute_capabilities = len(RTX_CAPABILITIES)
        for i, capability in enumerate(RTX_CAPABILITIES):
            config.set_compute_capability(getattr(trt.ComputeCapability, capability), i)
    return config


def _architectures(builder: str) -> str:
    found = gpu()
    return " ".join(RTX_CAPABILITIES).lower() if builder == RTX or not found else found.architecture


def _not_run_reason(builder: str) -> str | None:
    found = gpu()
    if not found:
        return "built, not run: no NVIDIA GPU here"
    if builder == RTX and found.architecture.replace("_", "").upper() not in RTX_CAPABILITIES:
        return f"built, not run: TensorRT-RTX has no engine for {found.name} ({found.architecture})"
    return None


TARGET = Target(
    name="tensorrt",
    runtime="tensorrt",
    precisions=("fp32", "fp16", "int8"),
    packages=("torch", "onnx", "onnxscript", "tensorrt", "tensorrt-rtx-cu13-libs"),
    convert=convert,
)
