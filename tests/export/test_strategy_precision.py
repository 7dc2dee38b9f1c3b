"""Half and eight bits: what must stay in float32 stays so in the file, and real inputs decide alike."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator

from export.lowering import quantize_weights, write_onnx
from export.source import OPERATOR, Source, cast
from training.checkpoint import Checkpoint
from training.frozen import FrozenModule
from training.models.strategy.frozen import TextEncoder, load_encoder
from training.spec import find_spec

pytestmark = pytest.mark.slow
LOUD = 300.0  # its square, 90,000, is beyond float16


@pytest.fixture(scope="module")
def encoder_fp16(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    source = Source(find_spec("strategy_encoder"), Checkpoint.load(checkpoints / "strategy"))
    path = tmp_path_factory.mktemp("fp16") / "model.onnx"
    write_onnx(source, OPERATOR, "fp16", path)
    return onnx.load(path)


def test_every_layer_norm_of_the_file_computes_in_float32(encoder_fp16: onnx.ModelProto) -> None:
    inferred = onnx.shape_inference.infer_shapes(encoder_fp16)
    kinds = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
    kinds |= {tensor.name: tensor.data_type for tensor in inferred.graph.initializer}
    norms = [node for node in inferred.graph.node if node.op_type == "LayerNormalization"]
    assert len(norms) == 5
    assert {kinds[name] for node in norms for name in node.input} == {TensorProto.FLOAT}
    halves = [tensor for tensor in inferred.graph.initializer if tensor.data_type == TensorProto.FLOAT16]
    assert sum(numpy_helper.to_array(tensor).size for tensor in halves) > 50_000


def loud_encoder(naive: bool) -> TextEncoder:
    """An encoder whose embeddings are so loud that their squares overflow float16; naive: its norms are ordinary."""
    encoder = TextEncoder("seeded:tiny", "main", "mean")
    encoder.model = cast(encoder.model, "bf16").float()  # a copy: the loaded one is shared
    encoder.model.embeddings.word_embeddings.weight.data *= LOUD / 0.02
    if naive:
        for module in encoder.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.__class__ = torch.nn.LayerNorm
    return encoder.requires_grad_(False)


def run_in_declared_types(encoder: TextEncoder, ids: np.ndarray, path: Path) -> np.ndarray:
    """The half-precision export, computed by ONNX's reference, which computes every node in the type it declares."""
    half = cast(encoder, "fp16")
    program = torch.export.export(half, (torch.from_numpy(ids),), strict=False)
    exported: Any = torch.onnx.export(program, dynamo=True, opset_version=20, optimize=True, verbose=False)
    exported.save(path)
    (found,) = ReferenceEvaluator(str(path)).run(None, {exported.model.graph.inputs[0].name: ids})
    return found


def test_activations_that_overflow_a_naive_conversion_do_not_overflow_ours(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(4, 260, (2, 12))
    want = loud_encoder(naive=False)(torch.from_numpy(ids)).numpy()
    with np.errstate(all="ignore"):
        ours = run_in_declared_types(loud_encoder(naive=False), ids, tmp_path / "ours.onnx")
        naive = run_in_declared_types(loud_encoder(naive=True), ids, tmp_path / "naive.onnx")
    assert np.abs(ours - want).max() < 0.05
    assert not np.abs(naive - want).max() < 0.5  # NaN, too, is not below


def test_a_frozen_module_is_never_in_training_mode() -> None:
    outer = torch.nn.Sequential(TextEncoder("seeded:tiny", "main", "cls"))
    outer.train()
    assert isinstance(outer[0], FrozenModule)
    assert not any(module.training for module in outer[0].modules())
    assert not any(parameter.requires_grad for parameter in load_encoder("seeded:tiny", "main").parameters())


def test_weights_become_int8_and_the_file_a_third(checkpoints: Path, tmp_path: Path) -> None:
    source = Source(find_spec("strategy_encoder"), Checkpoint.load(checkpoints / "strategy"))
    path = tmp_path / "model.onnx"
    write_onnx(source, OPERATOR, "fp32", path)
    before = path.stat().st_size
    quantize_weights(path)
    model = onnx.load(path)
    assert path.stat().st_size < 0.5 * before
    kinds = {node.op_type for node in model.graph.node}
    assert "MatMulInteger" in kinds or "DynamicQuantizeMatMul" in kinds
    assert "MatMul" in kinds  # the products of activations with each other stay in float32
