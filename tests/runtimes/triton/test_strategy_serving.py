"""From a trained checkpoint to the answer: pipelines, the cascade with its store, precomputing, a real Triton."""

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export import all as export_all
from export.verify import main as verify
from runtimes.cache.store import Store
from runtimes.errors import ArtifactError, InputError
from runtimes.pipeline import Pipeline, open_pipeline
from runtimes.pipelines.strategy.cached import StrategyCascade
from runtimes.pipelines.strategy.dialogue import EXAMPLE, STRATEGIES
from runtimes.predict import main as predict
from runtimes.repository import find
from runtimes.runtime import open_runtime
from runtimes.triton.server import TritonServer
from tests.toys import ask
from training.models.strategy import frozen
from training.models.strategy.make_encoder import main as make_encoder
from training.models.strategy.module import StrategyGraph
from training.precompute import main as precompute
from training.run import main as run

PARTS = ("strategy", "strategy_encoder", "strategy_emotion", "strategy_graph")
QUICK = ["--dialogues", "20", "--epochs", "2"]
PLAIN = {"turns": [{"speaker": "seeker", "text": "I feel fear today."}, {"speaker": "supporter", "text": "మీకు ఏమైంది?"}]}
LONG = {"turns": [{"speaker": "seeker", "text": f"turn {i}"} for i in range(40)]}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("strategy") / "checkpoints"
    assert run(["strategy", "--out", str(folder), *QUICK]) == 0
    return folder


@pytest.fixture(scope="module")
def repository(trained: Path) -> Path:
    folder = trained.parent / "repository"
    models = [argument for part in PARTS for argument in ("--model", part)]
    arguments = ["--target", "onnx", *models, "--checkpoints", str(trained), "--repository", str(folder)]
    assert export_all.main(arguments) == 0
    return folder


def answer_fused(repository: Path, requests: list[Any]) -> list[Any]:
    root = find(repository, "strategy_onnx")
    with open_runtime(root) as runtime:
        pipeline = open_pipeline(runtime.artifact, root)
        return pipeline.decode(runtime.fresh(pipeline.encode(requests)))


@pytest.fixture
def cascade(repository: Path, tmp_path: Path) -> Iterator[StrategyCascade]:
    with Store(tmp_path / "store") as store, StrategyCascade(repository, store) as opened:
        yield opened


def pipeline_of(part: str, repository: Path) -> Pipeline:
    root = find(repository, f"{part}_onnx")
    with open_runtime(root) as runtime:
        return open_pipeline(runtime.artifact, root)


def test_an_answer_says_the_strategy_and_what_led_to_it(repository: Path) -> None:
    (answer,) = answer_fused(repository, [EXAMPLE])
    assert answer["label"] == max(answer["probs"], key=answer["probs"].get)
    assert tuple(answer["probs"]) == STRATEGIES["esconv"]
    assert sum(answer["probs"].values()) == pytest.approx(1)
    assert len(answer["emotions"]) == len(answer["attention"]) == 2
    assert sum(answer["attention"]) == pytest.approx(1, abs=1e-5)
    json.dumps(answer, allow_nan=False)


def test_dialogues_of_a_batch_do_not_influence_each_other(repository: Path) -> None:
    requests = [EXAMPLE, PLAIN, LONG, EXAMPLE]
    together = answer_fused(repository, requests)
    for request, answer in zip(requests, together, strict=True):
        (alone,) = answer_fused(repository, [request])
        assert len(alone["emotions"]) == len(answer["emotions"])
        np.testing.assert_allclose(list(alone["probs"].values()), list(answer["probs"].values()), atol=1e-5)


def test_a_dialogue_longer_than_the_model_is_read_from_its_newest_turns(repository: Path) -> None:
    shorter = {"turns": LONG["turns"][-16:]}
    long, short = answer_fused(repository, [LONG, shorter])
    assert len(long["emotions"]) == 16
    assert long == short


def test_the_cascade_answers_as_the_fused_model(cascade: StrategyCascade, repository: Path) -> None:
    requests = [EXAMPLE, PLAIN, LONG]
    for got, want in zip(cascade.answer(requests), answer_fused(repository, requests), strict=True):
        assert got["label"] == want["label"]
        np.testing.assert_allclose(list(got["probs"].values()), list(want["probs"].values()), atol=1e-5)
        np.testing.assert_allclose(got["attention"], want["attention"], atol=1e-5)


def test_a_known_dialogue_runs_no_frozen_model_and_costs_less_than_two_milliseconds(
    cascade: StrategyCascade, monkeypatch: pytest.MonkeyPatch
) -> None:
    cold = cascade.answer([EXAMPLE])

    def forbidden(*_: Any) -> Any:
        raise AssertionError("a frozen model ran again")

    for reader in (cascade.contexts, cascade.emotions):
        monkeypatch.setattr(reader, "_compute", forbidden)
    samples = []
    for _ in range(300):
        started = time.process_time()  # of the clock on the wall, others at work have their share
        warm = cascade.answer([EXAMPLE])
        samples.append(time.process_time() - started)
    assert warm == cold
    assert np.median(samples) < 2e-3


def test_serving_finds_what_precomputing_kept(trained: Path, repository: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    data = tmp_path / "data.jsonl"
    start = {"turns": [{"speaker": "start", "text": "<START>"}], "label": 1}
    rows = [start, {**PLAIN, "label": 2}, start, {**PLAIN, "label": 3}]
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert precompute(["strategy", "--data", str(data), "--store", str(store)]) == 0
    with Store(store) as opened, StrategyCascade(repository, opened) as cascade:
        dialogue_text = "[seeker] I feel fear today. [supporter] మీకు ఏమైంది?"
        assert cascade.contexts.namespace.missing([dialogue_text]) == []
        assert cascade.emotions.namespace.missing(["I feel fear today."]) == []
        inputs = cascade.inputs([PLAIN])
        (kept,) = cascade.contexts.namespace.get([dialogue_text])
        assert kept is not None
        np.testing.assert_array_equal(inputs["context"][0], kept)


def test_a_store_of_another_encoder_is_refused_by_serving_and_by_training(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = str(tmp_path / "store")
    assert precompute(["strategy", "--store", store, "--pooling", "cls", *QUICK]) == 0
    with Store(Path(store)) as opened, pytest.raises(ArtifactError, match="pooling"):
        StrategyCascade(repository, opened).__enter__()
    assert run(["strategy", "--out", str(tmp_path / "out"), "--store", store, *QUICK]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert "another model's entries" in error


def test_precomputing_goes_on_where_it_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["strategy", "--store", str(tmp_path / "store"), "--padded-size", "500", *QUICK]
    asked = 0
    honest = frozen.TextEncoder.forward

    def interrupted(self: Any, ids: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked == 4:
            raise KeyboardInterrupt
        return honest(self, ids)

    with monkeypatch.context() as patched:
        patched.setattr(frozen.TextEncoder, "forward", interrupted)
        assert precompute(arguments) == 130
    capsys.readouterr()
    assert precompute(arguments) == 0
    total, rest = (int(cell) for cell in capsys.readouterr().out.splitlines()[2].split()[1:3])
    assert 0 < rest < total
    assert precompute(arguments) == 0
    assert capsys.readouterr().out.splitlines()[2].split()[2] == "0"


def test_training_from_a_store_runs_no_frozen_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = str(tmp_path / "store")
    assert precompute(["strategy", "--store", store, *QUICK]) == 0

    def forbidden(*_: Any) -> Any:
        raise AssertionError("a frozen model ran")

    monkeypatch.setattr(frozen.TextEncoder, "forward", forbidden)
    monkeypatch.setattr(frozen.EmotionClassifier, "forward", forbidden)
    assert run(["strategy", "--out", str(tmp_path / "out"), "--store", store, *QUICK]) == 0


def test_training_from_an_incomplete_store_names_the_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = str(tmp_path / "store")
    assert precompute(["strategy", "--store", store, *QUICK]) == 0
    assert run(["strategy", "--out", str(tmp_path / "out"), "--store", store, *QUICK, "--seed", "9"]) == 1
    assert "training.precompute strategy" in capsys.readouterr().err


def test_a_model_without_frozen_parts_has_nothing_to_precompute(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["policy_gru", "--store", str(tmp_path), "--set", "games=4", "--set", "frames=100"]
    assert precompute(arguments) == 2
    assert "frozen parts" in capsys.readouterr().err.splitlines()[-1]


def test_a_checkpoint_holds_no_frozen_weights_and_refuses_another_base(trained: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    with safe_open(trained / "strategy" / "weights.safetensors", "numpy") as stored:
        names = list(stored.keys())
    assert {name.partition(".")[0] for name in names} == {"dialogue"}
    trainable = StrategyGraph(json.loads((trained / "strategy" / "checkpoint.json").read_text())["config"])
    assert len(names) == len(trainable.state_dict())


@pytest.mark.parametrize("part", ["strategy_encoder", "strategy_emotion"])
def test_a_frozen_part_answers_texts_and_refuses_the_rest(part: str, repository: Path) -> None:
    pipeline = pipeline_of(part, repository)
    assert pipeline.encode([{"text": "a"}, {"text": "మీకు"}])["token_ids"].shape == (2, 14)
    for wrong in ({}, {"text": 3}, [], {"text": "a", "more": 1}):
        with pytest.raises(InputError, match="request 0"):
            pipeline.encode([wrong])


def test_long_texts_lose_their_oldest_tokens(repository: Path) -> None:
    pipeline = pipeline_of("strategy_emotion", repository)
    (ids,) = pipeline.encode([{"text": "a" * 500 + "b" * 62}])["token_ids"]
    (want,) = pipeline.encode([{"text": "b" * 62}])["token_ids"]
    np.testing.assert_array_equal(ids, want)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"context": [0.0]}, "64 numbers"),
        ({"context": ["x"] * 64}, "64 numbers"),
        ({"emotion_logits": None}, "emotion"),
    ],
)
def test_the_graph_part_refuses_what_it_cannot_read(change: dict[str, Any], named: str, repository: Path) -> None:
    pipeline = pipeline_of("strategy_graph", repository)
    with pytest.raises(InputError, match=named):
        pipeline.encode([{**pipeline.example(), **change}])


def test_predict_answers_from_a_file(repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "request.json"
    path.write_text(json.dumps(EXAMPLE))
    assert predict(["strategy", "--input", str(path), "--repository", str(repository)]) == 0
    assert json.loads(capsys.readouterr().out)["label"] in STRATEGIES["esconv"]


def test_predict_answers_alike_from_a_store(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "request.json"
    path.write_text(json.dumps(PLAIN))
    arguments = ["strategy", "--input", str(path), "--repository", str(repository)]
    answers = []
    for more in ([], ["--store", str(tmp_path / "store")], ["--store", str(tmp_path / "store")]):
        assert predict([*arguments, *more]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[1] == answers[2]
    assert answers[0]["label"] == answers[1]["label"]
    np.testing.assert_allclose(answers[0]["attention"], answers[1]["attention"], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("request_", [EXAMPLE, PLAIN, LONG], ids=["example", "plain", "long"])
def test_the_ensemble_answers_dialogues_as_the_pipeline_in_process(
    request_: Any, server: TritonServer, repository: Path
) -> None:
    got = ask(server, "strategy", json.dumps(request_, ensure_ascii=False))
    (want,) = answer_fused(repository, [request_])
    assert got["label"] == want["label"]
    np.testing.assert_allclose(list(got["probs"].values()), list(want["probs"].values()), atol=1e-5)
    np.testing.assert_allclose(got["attention"], want["attention"], atol=1e-5)
    assert len(got["emotions"]) == len(want["emotions"])


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS[1:])
def test_every_part_answers_through_the_server(part: str, server: TritonServer, repository: Path) -> None:
    assert ask(server, part, json.dumps(pipeline_of(part, repository).example()))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("curl"), reason="no curl")
def test_the_server_answers_the_curl_of_the_documentation(server: TritonServer, repository: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "serving.md").read_text()
    command = re.search(r"^curl -H 'Content-Type.*?^```", page, re.MULTILINE | re.DOTALL)
    assert command
    there = command[0].removesuffix("```").replace("127.0.0.1:8000", server.http_url)
    asked = subprocess.run(["bash", "-c", there], capture_output=True, text=True, check=True)
    (text,) = json.loads(asked.stdout)["outputs"][0]["data"]
    (want,) = answer_fused(repository, [{"turns": [{"speaker": "seeker", "text": "I lost my job last week."}]}])
    assert json.loads(text)["label"] == want["label"]


TURN = {"speaker": "seeker", "text": "x"}
WRONG = [
    (b"not json", "JSON"),
    (b'{"turns": [{"speaker": "seeker", "text": "\xff"}]}', "UTF-8"),
    (b'{"turns": []}', "turns"),
    (json.dumps({"turns": [{**TURN, "speaker": "doctor"}]}).encode(), "seeker"),
    (json.dumps({"turns": [{**TURN, "strategy": "Hypnosis"}]}).encode(), "Self-disclosure"),
    (json.dumps({"turns": [TURN, TURN], "edges": [[1, 3, 0]]}).encode(), r"1\.\.2"),
    (json.dumps({"turns": [TURN, TURN], "emotion_logits": [[0.0] * 7]}).encode(), "2 rows"),
    (json.dumps({"turns": [TURN] * 10_000}).encode(), "10000"),
]


@pytest.mark.parametrize(("request_", "named"), WRONG)
def test_predict_refuses_a_wrong_request_in_one_line(
    request_: bytes, named: str, repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "request.json"
    path.write_bytes(request_)
    arguments = ["strategy", "--input", str(path), "--repository", str(repository)]
    for more in ([], ["--store", str(tmp_path / "store")]):
        assert predict([*arguments, *more]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert re.search(named, line)


@pytest.mark.slow
@pytest.mark.parametrize(("request_", "named"), WRONG)
def test_the_server_refuses_a_wrong_request_in_one_line_and_answers_the_next(
    request_: bytes, named: str, server: TritonServer
) -> None:
    utils = pytest.importorskip("tritonclient.utils")
    with pytest.raises(utils.InferenceServerException, match=named) as caught:
        ask(server, "strategy", request_)
    assert "\n" not in str(caught.value).strip()
    assert ask(server, "strategy", json.dumps(EXAMPLE))["label"] in STRATEGIES["esconv"]


@pytest.mark.slow
def test_the_repository_passes_verification(repository: Path) -> None:
    assert verify(["--repository", str(repository)]) == 0


@pytest.mark.slow
def test_two_frozen_parts_may_have_two_tokenizers(tmp_path: Path) -> None:
    data = tmp_path / "data.json"
    turns = [{"speaker": "seeker", "content": f"I feel {word} today."} for word in ("sad", "glad", "afraid", "angry")]
    printed = [{"speaker": "supporter", "content": "Why?", "annotation": {"strategy": "Question"}}]
    data.write_text(json.dumps([{"dialog": [turn, *printed, turn, *printed]} for turn in turns]))
    encoder = tmp_path / "encoder"
    assert make_encoder(["--data", str(data), "--out", str(encoder), "--width", "32", "--vocabulary", "400"]) == 0
    arguments = ["strategy", "--data", str(data), "--encoder", str(encoder), "--history", "5", "--epochs", "1"]
    assert run([*arguments, "--out", str(tmp_path)]) == 0
    places = ["--checkpoints", str(tmp_path), "--repository", str(tmp_path / "repository")]
    assert export_all.main(["--target", "onnx", "--model", "strategy", "--model", "strategy_emotion", *places]) == 0
    (answer,) = answer_fused(tmp_path / "repository", [PLAIN])
    assert answer["label"] in STRATEGIES["esconv"]
