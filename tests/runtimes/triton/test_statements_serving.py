"""From a trained checkpoint to the vector: the pipeline, every target, a real Triton."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from export import all as export_all
from export.parity import require_passed
from export.source import Source
from export.verify import main as verify
from runtimes.artifact import Artifact
from runtimes.errors import InputError, ParityError
from runtimes.pipeline import Pipeline, open_pipeline
from runtimes.predict import main as predict
from runtimes.repository import find
from runtimes.runtime import open_runtime
from runtimes.triton.server import TritonServer
from tests.toys import ask
from training.checkpoint import Checkpoint
from training.models.statements.embedding import open_embedder
from training.models.statements.spec import VECTOR, agreement, same_neighbours
from training.models.statements.synthetic import flatten
from training.run import main as run
from training.spec import find_spec

SPEC = find_spec("statements")
LONG = "Let $R$ be a ring. " * 6000
TEXTS = ["Let $x$ be a ring.", "x", "Ω ⊂ ℝⁿ ist offen", LONG, "\n every field \t is a ring "]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("statements") / "checkpoints"
    assert run(["statements", "--out", str(folder), "--papers", "60", "--epochs", "2"]) == 0
    return folder


@pytest.fixture(scope="module")
def repository(trained: Path) -> Path:
    folder = trained.parent / "repository"
    export(folder, trained, "onnx", "fp32")
    return folder


def export(repository: Path, trained: Path, target: str, precision: str) -> None:
    places = ["--checkpoints", str(trained), "--repository", str(repository)]
    assert export_all.main(["--target", target, "--precision", precision, "--model", "statements", *places]) == 0


def vectors(repository: Path, texts: list[str], name: str = "statements_onnx") -> np.ndarray:
    root = find(repository, name)
    with open_runtime(root) as runtime:
        pipeline = open_pipeline(runtime.artifact, root)
        answers = pipeline.decode(runtime.fresh(pipeline.encode([{"text": text} for text in texts])))
    return np.array([answer["vector"] for answer in answers])


@pytest.fixture(scope="module")
def pipeline(repository: Path) -> Pipeline:
    root = find(repository, "statements_onnx")
    return open_pipeline(Artifact.load(root), root)


def test_what_is_served_is_what_collections_are_made_of(repository: Path, trained: Path) -> None:
    got = vectors(repository, TEXTS)
    want = open_embedder(Checkpoint.load(trained / "statements"), SPEC).embed(TEXTS)
    np.testing.assert_allclose(got, want, atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-5)


def test_texts_of_a_batch_do_not_influence_each_other(repository: Path) -> None:
    together = vectors(repository, TEXTS)
    for text, row in zip(TEXTS, together, strict=True):
        np.testing.assert_allclose(vectors(repository, [text])[0], row, atol=2e-6)


def test_a_long_text_is_read_from_its_start(pipeline: Pipeline) -> None:
    inputs = pipeline.encode([{"text": LONG}, {"text": LONG[:5000]}])
    assert inputs["input_ids"].shape == (2, 256)
    np.testing.assert_array_equal(inputs["input_ids"][0], inputs["input_ids"][1])


@pytest.mark.parametrize(
    ("requests", "named"),
    [
        ([], "at least one request"),
        ([{"text": "a"}, {"text": ""}], "request 1, text: expected a statement"),
        ([{"text": " \n\t"}], "request 0, text: expected a statement"),
        ([{"text": 5}], "request 0: expected an object"),
        (["a"], "request 0: expected an object"),
        ([{"texts": ["a"]}], "request 0: expected an object"),
        ([{"text": "a"}, {"text": "\ud800"}], "text 1: expected Unicode"),
    ],
)
def test_a_wrong_request_is_refused_in_one_line(requests: list[Any], named: str, pipeline: Pipeline) -> None:
    with pytest.raises(InputError, match=named) as caught:
        pipeline.encode(requests)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_fewer_bits_point_where_all_do(precision: str, repository: Path, trained: Path) -> None:
    export(repository, trained, "onnx", precision)
    name = f"statements_onnx_{precision}"
    cosines = (vectors(repository, TEXTS, name) * vectors(repository, TEXTS)).sum(1)
    assert (cosines > {"fp16": 0.9999, "int8": 0.98}[precision]).all()
    assert {"cosine", "top10", "order"} <= set(Artifact.load(find(repository, name)).parity)


def test_the_graph_has_no_adapters_and_no_sum_of_integers(repository: Path) -> None:
    model = onnx.load(find(repository, "statements_onnx") / "model.onnx")
    assert not [tensor.name for tensor in model.graph.initializer if "lora" in tensor.name]
    assert not [node.name for node in model.graph.node if "lora" in node.name]
    inferred = onnx.shape_inference.infer_shapes(model)
    kinds = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
    sums = [node for node in inferred.graph.node if node.op_type == "CumSum"]
    assert {kinds[node.output[0]] for node in sums} <= {onnx.TensorProto.FLOAT}


def test_parity_looks_at_real_statements_and_their_neighbours(repository: Path, trained: Path) -> None:
    proof = Artifact.load(find(repository, "statements_onnx")).parity
    assert {"difference_statement_vector", "cosine", "top10", "order"} <= set(proof)
    source = Source(SPEC, Checkpoint.load(trained / "statements"))
    rows = sum(len(inputs["input_ids"]) for inputs in SPEC.parity.parity_inputs(source.config, source.sample_inputs))
    assert rows == 35, "all held-out statements, for there are fewer than 64"


def test_int8_is_calibrated_on_training_papers_and_judged_on_others() -> None:
    config = SPEC.preset("tiny")
    recipe: Any = SPEC.training.recipe()(config, {**SPEC.training.settings["tiny"], "papers": 60}, None)
    train, valid = ({tuple(row) for row in recipe.tokens.rows(flatten(papers)[0])} for papers in recipe.papers)
    sample_inputs = recipe.sample_inputs()
    calibrated = {tuple(inputs["input_ids"][0]) for inputs in SPEC.export.calibration(config, sample_inputs)}
    assert train <= calibrated
    assert all(any(ids[: len(short)] == short for ids in train) for short in calibrated - train)
    assert min(map(len, calibrated)) == 2
    assert not train & valid
    for inputs in SPEC.parity.parity_inputs(config, sample_inputs):
        rows = zip(inputs["input_ids"], inputs["attention_mask"] > 0, strict=True)
        assert {tuple(ids[real]) for ids, real in rows} <= valid


def test_neighbours_in_another_order_or_place_fail_the_proof() -> None:
    rng = np.random.default_rng(0)
    want = rng.normal(size=(40, 64))
    want /= np.linalg.norm(want, axis=1, keepdims=True)
    assert same_neighbours(want, want) == (1.0, 1.0)
    doubled = np.concatenate([want, want])
    assert same_neighbours(doubled[::-1], doubled[::-1]) == (1.0, 1.0), "ties count as the same"
    noisy = want + rng.normal(size=want.shape) * 0.03
    top10, order = same_neighbours(noisy / np.linalg.norm(noisy, axis=1, keepdims=True), want)
    assert order < top10 < 1
    checks = agreement({VECTOR: noisy}, {VECTOR: want}, SPEC.parity.tolerance["fp32"])
    with pytest.raises(ParityError, match="3 of 3"):
        require_passed(checks)


def test_a_vector_of_nan_agrees_with_nothing() -> None:
    want = np.eye(40)
    got = want.copy()
    got[3] = np.nan
    with pytest.raises(ParityError):
        require_passed(agreement({VECTOR: got}, {VECTOR: want}, SPEC.parity.tolerance["int8"]))


def test_predict_answers_the_example(repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict(["statements", "--example", "--repository", str(repository)]) == 0
    path = tmp_path / "request.json"
    path.write_text(capsys.readouterr().out)
    assert predict(["statements", "--input", str(path), "--repository", str(repository)]) == 0
    assert len(json.loads(capsys.readouterr().out)["vector"]) == 2048


def test_the_traced_model_reads_padding_on_the_left(repository: Path, trained: Path) -> None:
    source = Source(SPEC, Checkpoint.load(trained / "statements"))
    ids = np.random.default_rng(0).integers(2, 500, (2, 12))
    mask = np.ones_like(ids)
    mask[1, :7] = 0
    with open_runtime(find(repository, "statements_onnx")) as runtime:
        (got,) = runtime.run({"input_ids": ids, "attention_mask": mask}).values()
        (alone,) = runtime.run({"input_ids": ids[1:, 7:], "attention_mask": mask[1:, 7:]}).values()
    with torch.no_grad():
        (want,) = source.module(torch.from_numpy(ids), torch.from_numpy(mask))
    np.testing.assert_allclose(got, want.numpy(), atol=2e-6)
    np.testing.assert_allclose(got[1], alone[0], atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("text", TEXTS, ids=["short", "one token", "other scripts", "100,000 characters", "blanks"])
def test_the_ensemble_answers_as_the_pipeline_in_process(text: str, server: TritonServer, repository: Path) -> None:
    got = ask(server, "statements", json.dumps({"text": text}))["vector"]
    np.testing.assert_allclose(got, vectors(repository, [text])[0], atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("request_", "named"),
    [
        ("not json", "JSON"),
        ('{"text": ""}', "expected a statement"),
        ('{"text": null}', "expected an object"),
        ('{"text": "\\ud800"}', "expected Unicode"),
    ],
)
def test_the_server_refuses_a_wrong_request_in_one_line(request_: str, named: str, server: TritonServer) -> None:
    utils = pytest.importorskip("tritonclient.utils")
    with pytest.raises(utils.InferenceServerException, match=named) as caught:
        ask(server, "statements", request_)
    assert "\n" not in str(caught.value).strip()


@pytest.mark.slow
def test_the_repository_passes_verification(repository: Path) -> None:
    assert verify(["--repository", str(repository)]) == 0
