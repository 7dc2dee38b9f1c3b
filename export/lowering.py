"""Steps that targets share: from a traced program to a checked ONNX file with named dynamic axes."""

import logging
import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.source import Source
from runtimes.errors import ParityError, one_line, require
from runtimes.tensors import Signature, TensorSpec
from training.layers.form import Form

if TYPE_CHECKING:
    import onnx
    import onnx_ir
    from torch.export import ExportedProgram
    from torch.onnx import ONNXProgram

OPSET = 20
NAME_SCOPES = "pkg.torch.onnx.name_scopes"  # the exporter's metadata key for a node's place in the module
EXTERNAL_BYTES = 1 << 30  # the limit of protobuf is 2 GiB


def write_onnx(source: Source, form: Form, precision: str, path: Path) -> None:
    """Write the model as ONNX with named dynamic axes, checked; `ParityError` if the exporter froze an axis."""
    onnx = require("onnx", extra="export")
    program = source.program(form, precision)
    if program not in source.onnx_programs:
        source.onnx_programs[program] = _exported(program, source.signature)
    weights_bytes = sum(tensor.nbytes for tensor in program.state_dict.values())
    source.onnx_programs[program].save(path, external_data=weights_bytes > EXTERNAL_BYTES)
    model = onnx.load(path, load_external_data=False)
    name_axes(model, source.signature)
    forget_traces(model.graph)
    onnx.save(model, path)
    check_onnx(path)


def _exported(program: "ExportedProgram", signature: Signature) -> "ONNXProgram":
    """The program in the operators of ONNX; it reads the program's own weights."""
    import torch

    # Every export logs that torchvision is missing.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=[tensor.name for tensor in signature.inputs],
            output_names=[tensor.name for tensor in signature.outputs],
            custom_translation_table=_translations(),
            verbose=False,
        )
    assert exported is not None  # only the dynamo=False exporter returns None
    fold_constants(exported.model)
    return exported


def forget_traces(graph: "onnx.GraphProto") -> None:
    """Remove the exporter's metadata of each node but its place in the module, in place.

    The rest holds source lines and paths of the machine that exported: another one would write other bytes.
    """
    for node in graph.node:
        kept = [entry for entry in node.metadata_props if entry.key == NAME_SCOPES]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                forget_traces(inner)


def fold_constants(model: "onnx_ir.Model") -> None:
    """Replace, in place, nodes on constants by their results, where these are no larger than the constants they free.

    The exporter does so for small parameters only. ONNX Runtime does so for all, but at every start, and it packs and
    quantizes the constants of the file.
    """
    require("onnxscript", extra="export")
    from onnxscript.optimizer import fold_constants as fold

    fold(model, should_fold=_is_worth_folding, output_size_limit=sys.maxsize)


def _is_worth_folding(node: "onnx_ir.Node") -> bool:
    """Whether a node on constants makes fewer numbers than it reads, or no more than those that only it reads."""
    shapes = [value.shape for value in node.outputs]
    if any(shape is None or not shape.is_static() for shape in shapes):
        return False
    made = sum(math.prod(shape.numpy()) for shape in shapes if shape is not None)
    tensors = [(value.const_value, len(value.uses())) for value in node.inputs if value is not None]
    read = max((tensor.size for tensor, _ in tensors if tensor is not None), default=0)
    freed = sum(tensor.size for tensor, uses in tensors if tensor is not None and uses == 1)
    return bool(made < read or made <= freed)


def name_axes(model: "onnx.ModelProto", signature: Signature) -> None:
    """Give every dynamic dimension of inputs and outputs the name of its axis, in place.

    torch.export names dimensions s16, s29, ...; worse, it may freeze one silently. `ParityError` then.
    """
    names: dict[str, str] = {}
    for tensor, value in zip(signature.inputs, model.graph.input, strict=True):
        for size, dim in zip(tensor.shape, value.type.tensor_type.shape.dim, strict=True):
            if isinstance(size, str):
                if not dim.dim_param or names.setdefault(dim.dim_param, size) != size:
                    raise _frozen(tensor, size, dim.dim_param or dim.dim_value)
                dim.dim_param = size
    for tensor, value in zip(signature.outputs, model.graph.output, strict=True):
        for size, dim in zip(tensor.shape, value.type.tensor_type.shape.dim, strict=True):
            if isinstance(size, str):
                if names.get(dim.dim_param) != size:
                    raise _frozen(tensor, size, dim.dim_param or dim.dim_value)
                dim.dim_param = size
    # The exporter's own shapes refer to s16; inference fills them in again under the new names.
    del model.graph.value_info[:]


def _frozen(tensor: TensorSpec, axis: str, found: Any) -> ParityError:
    return ParityError(
        f"tensor '{tensor.name}': expected axis '{axis}' to stay dynamic, found {found}; "
        "write the model so that torch.export keeps it"
    )


def quantize_weights(path: Path, exact: Sequence[str] = ()) -> None:
    """Make the constant factors of matrix products and the embeddings int8, in place; checked.

    The parts `exact` of the module keep their type. A matrix has one scale per column. Stacks of matrices are not
    quantized, for ONNX Runtime 1.31 fails to run them afterwards. Activations are quantized at run time, by ONNX
    Runtime; TensorRT does not read such a model.
    """
    onnx = require("onnx", extra="export")
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(path)
    external = weights_bytes(model) > EXTERNAL_BYTES
    stacks = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) > 2}
    for old in path.parent.glob(f"{path.name}*"):
        old.unlink()
    quantize_dynamic(
        model,
        path,
        op_types_to_quantize=["MatMul", "Gemm", "Gather"],
        weight_type=QuantType.QInt8,
        per_channel=True,
        nodes_to_exclude=[node.name for node in model.graph.node if stacks & set(node.input) or lies_in(node, exact)],
        use_external_data_format=external,
        extra_options={"MatMulConstBOnly": True},
    )
    check_onnx(path)


def lies_in(node: "onnx.NodeProto", parts: Sequence[str]) -> bool:
    """Whether the node comes from one of these parts of the module, by the exporter's metadata."""
    scopes = "".join(entry.value for entry in node.metadata_props if entry.key == NAME_SCOPES)
    return any(f"'{part}'" in scopes for part in parts)


def weights_bytes(model: "onnx.ModelProto") -> int:
    """The bytes of all initializers inside the model file."""
    return sum(len(tensor.raw_data) for tensor in model.graph.initializer)


def check_onnx(path: Path) -> None:
    """`ParityError` unless the full checker and strict shape inference accept the file."""
    onnx = require("onnx", extra="export")
    from onnx import checker, shape_inference

    try:
        checker.check_model(str(path), full_check=True)
        shape_inference.infer_shapes(onnx.load(path, load_external_data=False), strict_mode=True, data_prop=True)
    except (checker.ValidationError, shape_inference.InferenceError) as error:
        raise ParityError(f"{path.name}: expected valid ONNX, found {one_line(error)}") from error


def _translations() -> dict[Any, Any]:
    """Translations of the traced cells of training/layers/rnn.py to ONNX LSTM and GRU, and of softplus to one operator.

    The exporter keeps torch's threshold of softplus by three operators; ONNX's Softplus is exact without one.
    """
    import torch
    from onnxscript import opset20
    from onnxscript.function_libs.torch_lib.ops.core import aten_gru, aten_lstm
    from onnxscript.function_libs.torch_lib.ops.nn import aten_softplus

    import training.layers.rnn  # noqa: F401  registers the operators

    def softplus(x: Any, beta: float = 1.0, threshold: float = 20.0) -> Any:
        return opset20.Softplus(x) if beta == 1 else aten_softplus(x, beta, threshold)

    return {
        torch.ops.slipway.lstm.default: aten_lstm,
        torch.ops.slipway.gru.default: aten_gru,
        torch.ops.aten.softplus.default: softplus,
    }
