"""From a fitted checkpoint to the answer: training, the store, precision, the cache, a real Triton."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export import all as export_all
from export import parity
from export.lowering import quantize_weights
from export.source import Source
from runtimes.artifact import Check
from runtimes.cache.store import Store
from runtimes.engines.onnxruntime import OnnxRuntime
from runtimes.errors import ArtifactError, EngineError, InputError, ParityError
from runtimes.pipeline import Pipeline, open_pipeline, write_answer
from runtimes.pipelines.hallucination.detector import DetectorCache
from runtimes.pipelines.hallucination.grounding import EXAMPLE
from runtimes.predict import main as predict
from runtimes.repository import find
from runtimes.runtime import Runtime, open_runtime
from runtimes.triton.server import TritonServer
from tests.toys import ask
from tests.training.models.hallucination.test_hallucination_data import ragtruth
from training.checkpoint import Checkpoint
from training.evaluate import main as evaluate
from training.models.hallucination.reading import FeatureReader
from training.precompute import main as precompute
from training.run import main as run
from training.spec import find_spec

pytestmark = pytest.mark.slow
QUICK = ["--responses", "40"]
LONG = {"prompt": "The river is long. " * 60, "answer": "It is a long river, they say, and it is cold."}
PLAIN = {"prompt": "Zoë's café — నమస్తే — opened in 1932.", "answer": "It opened in 1932. 🌉 It closed in 2001."}
REQUESTS = {"example": EXAMPLE, "plain": PLAIN, "long": LONG}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hallucination") / "checkpoints"
    assert run(["hallucination", "hallucination_scorer", "--out", str(folder), *QUICK]) == 0
    return folder


@pytest.fixture(scope="module")
def repository(trained: Path) -> Path:
    folder = trained.parent / "repository"
    arguments = ["--target", "onnx", "--model", "hallucination", "--model", "hallucination_scorer"]
    assert export_all.main([*arguments, "--checkpoints", str(trained), "--repository", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def opened(repository: Path) -> Iterator[tuple[Runtime, Pipeline]]:
    root = find(repository, "hallucination_onnx")
    with open_runtime(root) as runtime:
        yield runtime, open_pipeline(runtime.artifact, root)


def answers(opened: tuple[Runtime, Pipeline], requests: list[Any]) -> list[Any]:
    runtime, pipeline = opened
    return pipeline.decode(runtime.fresh(pipeline.encode(requests)))


def close(got: Any, want: Any) -> None:
    """The same answer but for rounding."""
    assert (got["label"], got["threshold"]) == (want["label"], want["threshold"])
    assert got["response_score"] == pytest.approx(want["response_score"], abs=1e-3)
    assert [(s["start"], s["end"]) for s in got["spans"]] == [(s["start"], s["end"]) for s in want["spans"]]
    for one, other in zip(got["spans"], want["spans"], strict=True):
        np.testing.assert_allclose(one["ecs"], other["ecs"], atol=1e-4)
        np.testing.assert_allclose(one["pks"], other["pks"], atol=1e-4)


def test_an_answer_scores_the_chunks_of_the_text(opened: tuple[Runtime, Pipeline], trained: Path) -> None:
    config = Checkpoint.load(trained / "hallucination").config
    (answer,) = answers(opened, [EXAMPLE])
    assert answer.keys() == {"spans", "response_score", "label", "threshold"}
    assert 0 <= answer["response_score"] <= 1
    assert answer["threshold"] == config["threshold"]
    assert answer["label"] == ("hallucinated" if answer["response_score"] >= answer["threshold"] else "faithful")
    assert "".join(EXAMPLE["answer"][s["start"] : s["end"]] for s in answer["spans"]).replace(" ", "") == EXAMPLE[
        "answer"
    ].replace(" ", "")
    for span in answer["spans"]:
        assert (len(span["ecs"]), len(span["pks"])) == (len(config["heads"].split()), len(config["layers"].split()))
    json.dumps(answer, allow_nan=False)


def test_requests_of_a_batch_do_not_influence_each_other(opened: tuple[Runtime, Pipeline]) -> None:
    together = answers(opened, [EXAMPLE, PLAIN, LONG])
    for request, answer in zip([EXAMPLE, PLAIN, LONG], together, strict=True):
        close(answers(opened, [request])[0], answer)


def test_the_served_model_says_what_training_read(opened: tuple[Runtime, Pipeline], trained: Path) -> None:
    checkpoint = Checkpoint.load(trained / "hallucination")
    reader = FeatureReader(checkpoint.config, dict(checkpoint.training))
    (entry,) = reader.run([json.dumps(EXAMPLE)])
    (answer,) = answers(opened, [EXAMPLE])
    heads = len(checkpoint.config["heads"].split())
    np.testing.assert_allclose([span["ecs"] for span in answer["spans"]], entry[:, 3 : 3 + heads], atol=1e-5)
    np.testing.assert_allclose([span["pks"] for span in answer["spans"]], entry[:, 3 + heads :], atol=1e-5)


def test_given_spans_are_the_ones_scored(opened: tuple[Runtime, Pipeline]) -> None:
    (answer,) = answers(opened, [{**EXAMPLE, "spans": [[0, 10], [11, 40]]}])
    assert [(span["start"], span["end"]) for span in answer["spans"]] == [(0, 10), (11, 40)]


def test_nan_is_not_answered(opened: tuple[Runtime, Pipeline]) -> None:
    runtime, pipeline = opened
    outputs = runtime.fresh(pipeline.encode([EXAMPLE]))
    outputs["pks"] = outputs["pks"] * np.nan
    with pytest.raises(EngineError, match="output 'pks': expected finite numbers, found NaN"):
        pipeline.decode(outputs)


# Reading once --------------------------------------------------------------------------------------------------------


def test_what_was_precomputed_in_shares_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, store = str(ragtruth(tmp_path / "data")), str(tmp_path / "store")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert precompute(["hallucination", "--data", data, "--store", store]) == 0
        read = capsys.readouterr().out.splitlines()[-1].split()
        assert read[:3] == ["hallucination_features", "6", "3"], "six distinct texts, half of them in each share"
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")

    def forbidden(*_: Any) -> Any:
        raise AssertionError("the decoder ran again")

    monkeypatch.setattr(FeatureReader, "run", forbidden)
    assert run(["hallucination", "--data", data, "--store", store, "--out", str(tmp_path), "--folds", "2"]) == 0
    printed = capsys.readouterr().out
    assert evaluate(["hallucination", "--data", data, "--checkpoint", str(tmp_path / "hallucination")]) == 0
    assert capsys.readouterr().out in printed, "the same table: the baselines, too, are fitted to all heads again"


def test_precomputing_reads_every_answer_once_in_batches_of_the_size_that_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, ask = [], FeatureReader.run

    def counted(reader: FeatureReader, texts: Any) -> Any:
        sizes.append(len(texts))
        return ask(reader, texts)

    monkeypatch.setattr(FeatureReader, "run", counted)
    store = str(tmp_path / "store")
    assert precompute(["hallucination", "--store", store, "--responses", "4", "--padded_size", "1"]) == 0
    assert sizes == [1, 1, 1, 1]


def test_a_store_of_other_features_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["hallucination", "--store", str(tmp_path / "store"), "--out", str(tmp_path), *QUICK]
    assert run(arguments) == 0
    assert run([*arguments, "--jsd", "published"]) == 1
    assert "holds another model's entries: expected jsd" in capsys.readouterr().err


def test_evaluation_of_a_checkpoint_repeats_what_training_said(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert evaluate(["hallucination", "--checkpoint", str(trained / "hallucination"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["metrics"] == pytest.approx(dict(Checkpoint.load(trained / "hallucination").metrics), rel=1e-3)


def test_labels_of_one_class_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def faithful(_: list[Any], rows: list[Any]) -> None:
        for row in rows:
            row["labels"] = []

    data = str(ragtruth(tmp_path / "data", faithful))
    assert run(["hallucination", "--data", data, "--out", str(tmp_path)]) == 2
    assert "AUC is undefined" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "hallucination").exists()


# Parity --------------------------------------------------------------------------------------------------------------


def test_near_ties_are_put_aside_and_nothing_else_is(trained: Path) -> None:
    source = Source(find_spec("hallucination"), Checkpoint.load(trained / "hallucination"))
    spec, tolerance = source.spec, source.spec.parity.tolerance["fp32"]
    want = source.answer(source.draw_inputs(np.random.default_rng(0), source.signature.sizes("opt")))
    want["gaps"] = np.ones_like(want["gaps"])
    want["gaps"][0, 0, 0] = 1e-7
    tied = {**want, "ecs": want["ecs"].copy(), "scores": want["scores"].copy()}
    tied["ecs"][0, 0, 0] += 0.1
    tied["scores"][0, 0] += 0.1
    checks = parity.compare(source, tied, want, tolerance)
    parity.require_passed({name: check for name, check in checks.items() if name != "near_ties"})
    wrong = {**want, "ecs": want["ecs"].copy()}
    wrong["ecs"][0, 1, 0] += 0.1
    with pytest.raises(ParityError, match="difference_ecs"):
        parity.require_passed(parity.compare(source, wrong, want, tolerance))
    for name in ("ecs", "scores", "gaps"):
        nan = {**tied, name: tied[name].copy()}
        nan[name][0, 0] = np.nan
        with pytest.raises(ParityError, match=f"difference_{name}"):
            parity.require_passed(parity.compare(source, nan, want, tolerance))
    want["gaps"][:] = 1e-7
    limit = parity.compare(source, want, want, tolerance)["near_ties"]
    assert limit == Check(value=1.0, limit=0.05), "a model all of whose choices are ties is not proved"
    assert spec.export.fp32_modules == ("encoder", "scorer")


def test_int8_quantises_the_decoder_alone(repository: Path, tmp_path: Path) -> None:
    import onnx

    path = tmp_path / "model.onnx"
    path.write_bytes((find(repository, "hallucination_onnx") / "model.onnx").read_bytes())
    quantize_weights(path, find_spec("hallucination").export.fp32_modules)
    model = onnx.load(path)
    products = [node for node in model.graph.node if node.op_type == "MatMulInteger"]
    assert len(products) >= 7, "at least a layer's"
    floats = {entry.name for entry in model.graph.initializer if entry.data_type == onnx.TensorProto.FLOAT}
    assert "encoder.model.embeddings.word_embeddings.weight" in floats
    assert "base.model.model.embed_tokens.weight" not in floats
    quantize_weights(path := shutil.copy(find(repository, "hallucination_onnx") / "model.onnx", tmp_path / "all.onnx"))
    everything = [node for node in onnx.load(path).graph.node if node.op_type == "MatMulInteger"]
    assert len(everything) >= len(products) + 14, "the encoder's and the scorer's as well, were they not kept out"


# The cache -----------------------------------------------------------------------------------------------------------


def test_a_repeated_request_runs_nothing_and_answers_the_same(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: tuple[Runtime, Pipeline]
) -> None:
    with Store(tmp_path / "store") as store, DetectorCache(repository, store) as cache:
        first = cache.answer([LONG])
        close(first[0], answers(opened, [LONG])[0])
        monkeypatch.setattr(cache, "_compute", lambda texts: pytest.fail("the model ran again"))
        for work in ("encode", "decode"):
            monkeypatch.setattr(cache._pipeline, work, lambda *_: pytest.fail("a text was read again"))
        monkeypatch.setattr(store, "write", lambda *_: pytest.fail("an answer was kept again"))
        assert cache.answer([LONG, LONG]) == first * 2
    with Store(tmp_path / "store") as store, DetectorCache(repository, store) as cache:
        monkeypatch.setattr(cache, "_compute", lambda texts: pytest.fail("the store was not read"))
        assert cache.answer([LONG]) == first


def test_predict_uses_the_cache(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_again(*_: object) -> None:
        raise AssertionError("what is in the store was computed again")

    path = tmp_path / "request.json"
    path.write_text(json.dumps(PLAIN))
    arguments = ["hallucination", "--input", str(path), "--repository", str(repository)]
    stored = [*arguments, "--store", str(tmp_path / "store")]
    assert [predict(arguments), predict(stored)] == [0, 0]
    monkeypatch.setattr(OnnxRuntime, "infer", run_again)
    assert predict(stored) == 0
    one, other, known = map(json.loads, capsys.readouterr().out.splitlines())
    assert one == other == known


def test_the_cache_of_another_artifact_is_refused(repository: Path, tmp_path: Path) -> None:
    with Store(tmp_path / "store") as store:
        store.namespace("hallucination_onnx_answers", {"artifact": "another"})
        with pytest.raises(ArtifactError, match="holds another model's entries"):
            DetectorCache(repository, store)


# Triton --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REQUESTS)
def test_the_ensemble_answers_as_the_pipeline_in_process(
    name: str, server: TritonServer, opened: tuple[Runtime, Pipeline]
) -> None:
    want = json.loads(write_answer(answers(opened, [REQUESTS[name]])[0]))
    close(ask(server, "hallucination", json.dumps(REQUESTS[name])), want)


def test_the_scorer_answers_through_the_server(server: TritonServer, repository: Path) -> None:
    root = find(repository, "hallucination_scorer_onnx")
    with open_runtime(root) as runtime:
        pipeline = open_pipeline(runtime.artifact, root)
        (want,) = pipeline.decode(runtime.fresh(pipeline.encode([pipeline.example()])))
        got = ask(server, "hallucination_scorer", json.dumps(pipeline.example()))
        np.testing.assert_allclose(got["scores"], want["scores"], atol=1e-5)
        wrong = pipeline.example()
        wrong["ecs"][0][0] = float("nan")
        with pytest.raises(InputError, match="request 0, ecs: expected finite numbers, found NaN"):
            pipeline.encode([wrong])


WRONG = {
    "not JSON": ("not json", "expected JSON in UTF-8"),
    "empty context": (json.dumps({"contexts": [""], "answer": "x"}), "context 0: expected a text, found an empty one"),
    "no answer": (json.dumps({"prompt": "x"}), "expected an object with"),
    "span out of range": (json.dumps({**EXAMPLE, "spans": [[0, 999]]}), "spans: expected 0 <= start < end"),
    "answer too long": (
        json.dumps({**EXAMPLE, "answer": "word " * 400}),
        "expected an answer inside the context window",
    ),
    "too many spans": (json.dumps({**EXAMPLE, "spans": [[i, i + 1] for i in range(9)]}), "at most 8 spans, found 9"),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_server_refuses_a_wrong_request_in_one_line(name: str, server: TritonServer) -> None:
    utils = pytest.importorskip("tritonclient.utils")
    request, message = WRONG[name]
    with pytest.raises(utils.InferenceServerException, match=message) as caught:
        ask(server, "hallucination", request)
    assert "\n" not in str(caught.value).strip()
