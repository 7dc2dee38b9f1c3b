"""A server under load: every answer is checked, and so is the memory."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from export.triton.repository import drafting, publish, publish_ensemble
from export.triton.scheduling import Scheduling
from runtimes import soak
from runtimes.artifact import Artifact
from runtimes.bench import suite
from runtimes.bench.interleave import Subject
from runtimes.bench.plan import Settings
from runtimes.bench.results import counted_samples
from runtimes.errors import EngineError, InputError, Overloaded
from runtimes.repository import find
from runtimes.triton.client import CLIENTS, Answer, TritonClient
from runtimes.triton.server import TritonServer
from tests import toys

pytestmark = toys.needs_server()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.checkout_with_pipeline(tmp_path_factory.mktemp("checkout"))


@pytest.fixture(scope="module")
def repository(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Both toys with their ensembles, the stateless one with limits; the toy pipeline here and in the server."""
    repository = tmp_path_factory.mktemp("soaked") / "model_repository"
    limits = Scheduling(instances=2, queue=1)
    with toys.known_pipeline(checkout / "runtimes" / "pipelines"), pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLIPWAY_PATH", str(checkout))
        for signature in (toys.DOUBLING, toys.RUNNING):
            with drafting(repository) as draft:
                version = publish(draft, toys.make(draft, signature), repository, scheduling=limits)
            publish_ensemble(Artifact.load(version), repository, limits)
        yield repository


def test_valid_requests_are_answered_and_invalid_ones_rejected(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert soak.main(["--repository", str(repository), "--seconds", "2", "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)["counts"]
    assert counts.keys() - {soak.BUSY} == {soak.CORRECT, soak.REJECTED}  # two clients may meet at the limit
    assert min(counts[what] for what in (soak.CORRECT, soak.REJECTED)) > 10


def test_an_overload_sends_more_than_the_knee_without_waiting_for_answers(
    repository: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soak, "KNEE_S", 0.1)
    arguments = ["doubling", "--repository", str(repository), "--overload", "8", "--seconds", "1", "--json"]
    assert soak.main(arguments) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["counts"].keys() == {soak.CORRECT, soak.BUSY}
    assert sum(printed["counts"].values()) == pytest.approx(float(printed["sent a second"]), abs=1)


def send_tensors(client: TritonClient, value: float) -> Answer:
    return client.send("doubling_onnx", {"x": np.full((1, 16, 3), value, np.float32)}, ["y"])


def send_json(client: TritonClient, value: float) -> Answer:
    request = json.dumps({"x": [[value] * 3]}).encode()
    return client.send("doubling", {"request": np.array([[request]], np.object_)}, ["answer"])


def doubled(answer: dict[str, np.ndarray]) -> float:
    return json.loads(answer["answer"].item())["last"][0] if "answer" in answer else answer["y"][0, -1, 0]


@pytest.mark.parametrize("send", [send_tensors, send_json], ids=["model", "ensemble"])
def test_requests_beyond_the_queue_are_refused_and_no_answer_is_wrong(
    repository: Path, send: Callable[[TritonClient, float], Answer]
) -> None:
    """Of the model itself, and of the ensemble, which waits at the steps as well."""
    with TritonServer(repository) as server:
        client = CLIENTS["grpc"](server.grpc_url, 20)
        right = refused = 0
        for _ in range(50):  # the number that arrives at once depends on the machine
            if right and refused:
                break
            values = [float(value) for value in range(500)]
            for value, answer in [(value, send(client, value)) for value in values]:
                try:
                    assert doubled(answer()) == 2 * value
                    right += 1
                except Overloaded:
                    refused += 1
        client.close()
    assert right
    assert refused


def test_a_server_that_refuses_is_measured(repository: Path, checkout: Path) -> None:
    """Two instances with room for one more: of 16 in flight most are refused, and what is answered has its figures."""
    root = find(repository, "doubling_onnx")
    artifact = Artifact.load(root)
    subject = Subject(artifact=artifact, root=root, label="triton", served=True, checkout=checkout)
    settings = Settings(seconds=0.3, windows=3, max_windows=3, concurrency=(1, 16), rates=(20_000.0,))
    arrived, one, many = suite.measure([subject], ["server", "concurrency"], settings)
    assert one["refused_share"] == 0
    for row in (many, arrived):
        assert 0.05 < row["refused_share"] < 1
        assert row["refused_share"] == row["refused"] / (row["refused"] + len(counted_samples(row)))
        assert row["p50_s"] > 0
    assert 0 < arrived["goodput_per_s"] <= arrived["rows_per_s"]


@pytest.mark.parametrize(
    ("answer", "same"),
    [
        ({"a": [1.0, "b"]}, True),
        ({"a": [1.00001, "b"]}, True),
        ({"a": [1.01, "b"]}, False),
        ({"a": [1.0, "c"]}, False),
        ({"a": [1.0]}, False),
        ({"a": [1.0, "b"], "c": 1}, False),
        ({"a": [float("nan"), "b"]}, False),
        ([1.0, "b"], False),
    ],
)
def test_answers_are_alike_up_to_the_last_digits(answer: object, same: bool) -> None:
    assert soak.alike(answer, {"a": [1.0, "b"]}) is same


class StubClient:
    """A client that answers or fails with these results, one after the other."""

    def __init__(self, *answers: bytes | Exception) -> None:
        self.answers = list(answers)

    def send(self, *_: object, **__: object) -> object:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return lambda: {"answer": np.array([[answer]], object)}


class Counter:
    """A stub of a checked request that counts the requests to it."""

    def __init__(self) -> None:
        self.valid, self.invalid = 0, set[bytes]()

    def send(self, tally: soak.Tally) -> None:
        self.valid += 1

    def send_invalid(self, tally: soak.Tally, request: bytes) -> None:
        self.invalid.add(request)


@pytest.mark.parametrize("models", range(1, 21))
def test_every_model_receives_valid_and_invalid_requests_for_any_number_of_models(models: int) -> None:
    """With 5, 10 or 15 models in rotation, every fifth request would always go to the same models."""
    counters = [Counter() for _ in range(models)]
    calls = [soak.rotation(counters, soak.Tally(), offset) for offset in range(4)]  # type: ignore[arg-type]
    for _ in range(50 * models):
        for call in calls:
            call()
    for each in counters:
        assert 130 < each.valid < 190, "about four fifths of 200"
        assert len(each.invalid) >= 6, "of eight kinds"


def test_growth_is_from_after_the_first_tenth_to_the_last_tenth() -> None:
    memory = soak.Memory(server=None)  # type: ignore[arg-type]
    memory.samples = [100_000_000 * i for i in range(10)] + [1_000_000_000] * 80 + [1_250_000_000] * 10
    assert memory.growth() == (1000, 250)


def test_memory_growth_past_the_limit_is_in_the_status(
    repository: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soak.Memory, "growth", lambda self: (300.0, 100.5))
    assert soak.main(["--repository", str(repository), "--model", "doubling", "--seconds", "0.2", "--json"]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed["counts"].keys() <= {soak.CORRECT, soak.REJECTED, soak.BUSY}
    assert printed["memory growth, MB"] == "+100.5 of 100 allowed"


def test_a_limit_that_is_no_number_is_refused(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert soak.main(["--repository", str(repository), "--max-growth-mb", "nan"]) == 2
    assert "--max-growth-mb: expected a number of 0 or more, found nan" in capsys.readouterr().err


def test_every_outcome_is_counted_under_its_name() -> None:
    client = StubClient(
        b"1", b"1", b"2", b"{", Overloaded(""), EngineError(""), InputError(""), InputError(""), b"1", EngineError(""),
        Overloaded(""),
    )  # fmt: skip
    checked, tally = soak.CheckedRequest(client, "toy", b"{}"), soak.Tally()
    for _ in range(6):
        checked.send(tally)
    for _ in range(4):
        checked.send_invalid(tally, b"{")
    assert tally.counts == {
        soak.CORRECT: 1, soak.WRONG: 2, soak.BUSY: 2, soak.FAILED: 2, soak.REJECTED: 1, soak.ACCEPTED: 1, soak.BROKEN: 1
    }  # fmt: skip
