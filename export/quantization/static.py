"""Static int8: explicit Q/DQ around the constant matrix products of an ONNX file, calibrated on real inputs.

The scales lie in the file, so a row's answer does not depend on its batch, and one file serves every engine that reads
QuantizeLinear: ONNX Runtime, OpenVINO, and TensorRT, which needs symmetric scales. Outlier channels of an activation
are first scaled down, and their weights up (SmoothQuant, Xiao et al. 2023, equation 4). The share of that scaling and
the clipping are those with the smallest error of the product. Its mean error is subtracted from the bias.

Why not a library's quantizer: on MiniLM, the share of the ten nearest sentences that stay the same as in float32 is
.948 in ONNX Runtime and .950 in OpenVINO with this file; .710 with ONNX Runtime's `quantize_static`, .521 with its
symmetric scales, which then also run slower than float32; .892 with its `quantize_dynamic`, whose answer depends on the
batch and which TensorRT does not read; .940 with NNCF's int8, measured in OpenVINO.
`python -m benchmarks.peers_cpu.run peers` measures all of them; results: benchmarks/peers_cpu/peers_cpu_2026-11-21.md.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from export.lowering import EXTERNAL_BYTES, check_onnx, lies_in, weights_bytes
from export.source import Source
from runtimes.errors import ParityError, require
from runtimes.tensors import BATCH, Tensors

CALIBRATION_INPUTS = 512
ROWS = 2048  # of an activation, on which the error of a product is measured
SHARES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # of a channel's range that moves to the weights
CLIPS = (1.0, 0.9, 0.8, 0.7)  # of the largest value observed
LARGEST = 127  # symmetric: TensorRT has no zero point, and -128 has no counterpart
TINY = 1e-8

Matrix = np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class Product:
    """One activation and the constant matrices that multiply it, side by side: float32 [width in, all widths out]."""

    activation: str
    nodes: Sequence[Any]
    weights: Matrix
    widths: Sequence[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Observed:
    """The observed values of an activation: the largest magnitude of each channel, and some rows."""

    largest: np.ndarray
    rows: Matrix


@dataclass(frozen=True, kw_only=True, slots=True)
class Scales:
    """How a product becomes int8: activation / `smooth` / `step`, weights * `smooth` / `steps`.

    `weights` are rounded; `drift` is the mean error of the product.
    """

    smooth: np.ndarray
    step: np.float32
    weights: Matrix
    steps: np.ndarray
    drift: np.ndarray


def calibration_inputs(source: Source) -> Iterator[Tensors]:
    """Complete inputs of one row each: the model's own calibration inputs, or else inputs of all sizes."""
    rng, signature = np.random.default_rng(0), source.signature
    if source.spec.export.calibration:
        chosen = source.spec.export.calibration(source.config, source.sample_inputs)
        yield from (
            {**inputs, **signature.zero_state(1)} for inputs, _ in zip(chosen, range(CALIBRATION_INPUTS), strict=False)
        )
        return
    for _ in range(CALIBRATION_INPUTS):
        sizes = {axis.name: int(rng.integers(axis.min, axis.max, endpoint=True)) for axis in signature.axes}
        yield {**source.draw_inputs(rng, {**sizes, BATCH: 1}), **signature.zero_state(1)}


def quantize_static(path: Path, inputs: Iterable[Tensors], exact: Sequence[str] = ()) -> None:
    """Make the constant matrix products int8 in place, checked; `ParityError` if there are none.

    Matrices that multiply one activation become one product: an engine then quantizes it once, and ONNX Runtime 1.31
    computes in int8 only where a QuantizeLinear has a single reader. Stacks of matrices are not quantized.
    """
    onnx = require("onnx", extra="export")
    model = onnx.load(path)
    products = find_products(model, exact)
    if not products:
        raise ParityError(f"{path.name}: expected products with constant matrices to make int8, found none")
    observed = observe(path, [product.activation for product in products], inputs)
    for product in products:
        rewrite(model, product, choose_scales(observed[product.activation], product.weights))
    drop_unused(model)
    external = weights_bytes(model) > EXTERNAL_BYTES
    for old in path.parent.glob(f"{path.name}*"):
        old.unlink()
    onnx.save(model, path, save_as_external_data=external, location=f"{path.name}.data")
    check_onnx(path)


def find_products(model: Any, exact: Sequence[str] = ()) -> list[Product]:
    """Every activation that constant matrices multiply, by MatMul or Gemm, outside the parts `exact` of the module."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer if len(tensor.dims) == 2}
    readers: dict[str, list[Any]] = {}
    for node in model.graph.node:
        if lies_in(node, exact):
            continue
        if node.op_type in ("MatMul", "Gemm") and node.input[1] in constants and node.input[0] not in constants:
            readers.setdefault(node.input[0], []).append(node)
    products = []
    for activation, nodes in readers.items():
        matrices = [matrix(node, constants[node.input[1]]) for node in nodes]
        products.append(
            Product(
                activation=activation,
                nodes=nodes,
                weights=np.concatenate(matrices, 1),
                widths=[each.shape[1] for each in matrices],
            )
        )
    return products


def matrix(node: Any, tensor: Any) -> Matrix:
    """The constant factor of a node as [width in, width out]; `ParityError` for a Gemm that is more than a Linear."""
    from onnx import numpy_helper

    settings = {each.name: each.f if each.name in ("alpha", "beta") else each.i for each in node.attribute}
    if settings.get("transA") or settings.get("alpha", 1) != 1 or settings.get("beta", 1) != 1:
        raise ParityError(f"{node.name}: expected a Gemm as of a Linear, found {settings}; leave it out of int8")
    weights = numpy_helper.to_array(tensor).astype(np.float32)
    return weights.T if settings.get("transB") else weights


def observe(path: Path, activations: Sequence[str], inputs: Iterable[Tensors]) -> dict[str, Observed]:
    """The observed activations of the float model on these inputs."""
    onnx, ort = require("onnx", extra="export"), require("onnxruntime", extra="onnx")
    model = onnx.load(path, load_external_data=False)
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in activations)
    opened = path.with_name(f"observed-{path.name}")  # in the same folder, for external weights
    onnx.save(model, opened)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    try:
        session = ort.InferenceSession(opened, options, providers=["CPUExecutionProvider"])
    finally:
        opened.unlink()
    rng = np.random.default_rng(0)
    largest: dict[str, np.ndarray] = {}
    rows: dict[str, list[Matrix]] = {name: [] for name in activations}
    inputs = list(inputs)
    rows_per_feed = max(1, ROWS // max(1, len(inputs)))
    for each in inputs:
        for name, value in zip(activations, session.run(list(activations), each), strict=True):
            flat = value.reshape(-1, value.shape[-1])
            largest[name] = np.maximum(largest.get(name, 0), np.abs(flat).max(0))
            rows[name].append(flat[rng.permutation(len(flat))[:rows_per_feed]])
    return {name: Observed(largest=largest[name], rows=np.concatenate(rows[name])) for name in activations}


def choose_scales(observed: Observed, weights: Matrix) -> Scales:
    """The scales whose int8 product differs least, in the mean square, from rows @ weights."""
    wanted = observed.rows @ weights
    best, least = None, np.inf
    for share in SHARES:
        smooth = smoothing(observed.largest, np.abs(weights).max(1), share)
        rows = observed.rows / smooth
        steps = np.maximum(np.abs(weights * smooth[:, None]).max(0), TINY) / LARGEST
        rounded = np.clip(np.round(weights * smooth[:, None] / steps), -LARGEST, LARGEST)
        for clip in CLIPS:
            step = np.float32(clip * max((observed.largest / smooth).max(), TINY) / LARGEST)
            error = np.clip(np.round(rows / step), -LARGEST, LARGEST) * step @ (rounded * steps) - wanted
            if (found := float(np.square(error).mean())) < least:
                least = found
                best = Scales(
                    smooth=smooth,
                    step=step,
                    weights=rounded.astype(np.int8),
                    steps=steps.astype(np.float32),
                    drift=error.mean(0).astype(np.float32),
                )
    if best is None:
        raise ParityError("expected finite activations to calibrate on, found NaN or infinity")
    return best


def smoothing(largest: np.ndarray, weights: np.ndarray, share: float) -> np.ndarray:
    """The divisor of each channel of an activation, and the factor of its weights; geometric mean 1."""
    factors = np.maximum(largest, TINY) ** share / np.maximum(weights, TINY) ** (1 - share)
    return np.clip(factors / np.exp(np.log(factors).mean()), 1e-3, 1e3).astype(np.float32)


def rewrite(model: Any, product: Product, scales: Scales) -> None:
    """Replace the nodes of a product by its int8 form, at the place of the first of them."""
    from onnx import helper, numpy_helper

    graph, stem = model.graph, f"{product.activation}_int8"

    def constant(name: str, value: np.ndarray) -> str:
        graph.initializer.append(numpy_helper.from_array(value, f"{stem}_{name}"))
        return f"{stem}_{name}"

    nodes = []

    def add(kind: str, inputs: Sequence[str], outputs: Sequence[str], **settings: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, outputs, name=outputs[0], **settings))
        return outputs[0]

    smooth = add("Mul", [product.activation, constant("reciprocal", 1 / scales.smooth)], [f"{stem}_smooth"])
    coding = [constant("step", np.asarray(scales.step)), constant("zero", np.zeros((), np.int8))]
    quantized = add("QuantizeLinear", [smooth, *coding], [f"{stem}_q"])
    activation = add("DequantizeLinear", [quantized, *coding], [f"{stem}_dq"])
    stored = [constant("weights", scales.weights), constant("steps", scales.steps)]
    stored.append(constant("zeros", np.zeros(len(scales.steps), np.int8)))
    weights = add("DequantizeLinear", stored, [f"{stem}_w"], axis=1)
    whole = add("MatMul", [activation, weights], [f"{stem}_product"])
    outputs = [node.output[0] for node in product.nodes]
    if (bias := absorb_bias(model, product, scales.drift)).any():
        # ONNX Runtime 1.31 would make a Gemm of a product of rows and an Add, and compute that in float.
        whole = add("Sub", [whole, constant("negative_bias", -bias)], [f"{stem}_sum"])
    if len(outputs) > 1:
        add("Split", [whole, constant("widths", np.asarray(product.widths))], outputs, axis=-1)
    else:
        nodes[-1].output[0] = outputs[0]
    _replace(graph, product.nodes, nodes)


def absorb_bias(model: Any, product: Product, drift: np.ndarray) -> np.ndarray:
    """The vector to add to the whole product: biases of Gemms less the drift; 0 where a following Add absorbed it."""
    from onnx import numpy_helper

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    parts = []
    for node, part in zip(product.nodes, np.split(drift, np.cumsum(product.widths)[:-1]), strict=True):
        own = numpy_helper.to_array(constants[node.input[2]]) if len(node.input) > 2 else np.float32(0)
        bias = own - part
        if found := following_bias(model, node, constants, len(part)):
            addition, index = found
            moved = numpy_helper.to_array(constants[addition.input[index]]) + bias
            addition.input[index] = f"{node.output[0]}_bias"
            model.graph.initializer.append(numpy_helper.from_array(moved, addition.input[index]))
            bias = np.zeros_like(part)
        parts.append(bias)
    return np.concatenate(parts)


def following_bias(model: Any, node: Any, constants: Mapping[str, Any], width: int) -> tuple[Any, int] | None:
    """The only reader of a product if it is an Add of a constant vector, and which of its inputs the vector is."""
    readers = [other for other in model.graph.node if node.output[0] in other.input]
    if len(readers) != 1 or readers[0].op_type != "Add":
        return None
    vectors = (i for i, name in enumerate(readers[0].input) if name in constants)
    index = next((i for i in vectors if list(constants[readers[0].input[i]].dims) == [width]), None)
    return None if index is None else (readers[0], index)


def _replace(graph: Any, old: Sequence[Any], new: Sequence[Any]) -> None:
    names = {node.name for node in old}
    place = min(index for index, node in enumerate(graph.node) if node.name in names)
    kept = [node for node in graph.node if node.name not in names]
    del graph.node[:]
    graph.node.extend([*kept[:place], *new, *kept[place:]])


def drop_unused(model: Any) -> None:
    """Remove the constants that no node reads."""
    read = set(names_read(model.graph))
    kept = [tensor for tensor in model.graph.initializer if tensor.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def names_read(graph: Any) -> Iterator[str]:
    """The values that nodes read, also those in the branches of an If or the body of a Scan."""
    for node in graph.node:
        yield from node.input
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from names_read(inner)
    yield from (value.name for value in graph.output)
