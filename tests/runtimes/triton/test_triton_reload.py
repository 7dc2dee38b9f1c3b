"""While new versions are published, a request in JSON is answered, and by encode, model and decode of one version."""

import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest

from export.triton.lint import lint
from export.triton.repository import drafting, publish, publish_ensemble
from runtimes.artifact import Artifact
from runtimes.errors import EngineError, InputError
from runtimes.serve import follow
from runtimes.tensors import Signature
from runtimes.triton.client import CLIENTS, TritonClient
from runtimes.triton.server import EVERY_MODEL, TritonServer
from runtimes.triton.version_watch import VersionWatch
from tests import toys

pytestmark = toys.needs_server()


def publish_numbered(repository: Path, number: int, signature: Signature = toys.DOUBLING) -> Path:
    """A version of which encode adds `number`, the model multiplies by it (`doubling`), and decode says it."""
    changes = {"factor": float(number), "unit": number, "config": {"offset": number}, "key": f"key {number}"}
    with drafting(repository) as draft:
        version = publish(draft, toys.make(draft, signature, **changes), repository)
    publish_ensemble(Artifact.load(version), repository)
    return version


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("SLIPWAY_PATH", str(toys.checkout_with_pipeline(tmp_path / "checkout")))
    with toys.known_pipeline(tmp_path / "plugins"):
        publish_numbered(tmp_path / "model_repository", 1)
        yield tmp_path / "model_repository"


@pytest.fixture
def told(repository: Path) -> Iterator[TritonServer]:
    """A server that loads what it is told to, as `runtimes.serve` has it."""
    versions, done = VersionWatch(repository), Event()
    versions.look()

    def keep_telling() -> None:
        while not done.wait(0.5):
            with suppress(OSError):
                follow(server, versions)

    with TritonServer(repository, models=[EVERY_MODEL], strict=False) as server, ThreadPoolExecutor(1) as pool:
        telling = pool.submit(keep_telling)
        yield server
        done.set()
        telling.result()


@pytest.fixture
def polling(repository: Path) -> Iterator[TritonServer]:
    """A server that looks for itself, as one may that is started without `runtimes.serve`."""
    with TritonServer(repository, poll_s=1, strict=False) as server:
        yield server


@pytest.fixture
def server(request: pytest.FixtureRequest) -> TritonServer:
    server: TritonServer = request.getfixturevalue(getattr(request, "param", "told"))
    return server


@pytest.fixture
def client(server: TritonServer) -> Iterator[TritonClient]:
    client = CLIENTS["grpc"](server.grpc_url, 20)
    yield client
    client.close()


def ask(client: TritonClient, model: str = "doubling", **sequence: Any) -> dict[str, Any]:
    request = np.array([[b'{"x": [[0, 1, 0]]}']], np.object_)
    answer: dict[str, Any] = json.loads(
        client.send(model, {"request": request}, ["answer"], **sequence)()["answer"][0, 0]
    )
    return answer


def made_by(client: TritonClient) -> tuple[float, float, int]:
    """Which version of encode, of the model and of decode made an answer."""
    answer = ask(client)
    zero, one, _ = answer["last"]
    factor = one - zero
    return zero / factor, factor, answer["unit"]


@pytest.mark.parametrize("server", ["told", "polling"], indirect=True)
def test_every_answer_is_of_one_version_and_none_fails_while_versions_change(
    server: TritonServer, repository: Path, client: TritonClient
) -> None:
    seen: list[tuple[float, float, int]] = []
    done = Event()

    def keep_asking() -> None:
        while not done.is_set():
            seen.append(made_by(client))  # must never fail

    with ThreadPoolExecutor(3) as pool:
        asking = [pool.submit(keep_asking) for _ in range(3)]
        try:
            for number in range(2, 6):
                publish_numbered(repository, number)
                new = (number, number, number)
                toys.wait_for(lambda new=new: seen[-1:] == [new] or any(map(Future.done, asking)))
        finally:
            done.set()
        for each in asking:
            each.result()
    assert set(seen) == {(number, number, number) for number in range(1, 6)}
    assert lint(repository) == []


def test_a_version_that_follows_faster_than_one_loads_is_not_mixed_with_it(
    server: TritonServer, repository: Path, client: TritonClient
) -> None:
    """The server may then drop a version that its ensemble still names; such requests fail."""
    seen = set()
    publish_numbered(repository, 2)
    toys.wait_for(lambda: {"LOADING"} & {model["state"] for model in server.index()})
    publish_numbered(repository, 3)

    def newest_is_served() -> bool:
        with suppress(EngineError):
            seen.add(made_by(client))
        return (3, 3, 3) in seen

    toys.wait_for(newest_is_served)
    assert seen <= {(number, number, number) for number in range(1, 4)}


@pytest.mark.parametrize("server", ["polling"], indirect=True)
def test_a_corrupt_version_is_not_mixed_in_and_the_next_is_served(
    server: TritonServer, repository: Path, client: TritonClient
) -> None:
    version = publish_numbered(repository, 2)
    (version / "model.onnx").write_bytes(b"not a model")
    seen = set()

    def refused() -> bool:
        try:
            seen.add(made_by(client))
        except EngineError as error:
            return "no available versions" in str(error)
        return False

    toys.wait_for(refused)
    assert seen <= {(1, 1, 1)}
    publish_numbered(repository, 3)
    toys.wait_for(lambda: not refused())
    assert made_by(client) == (3, 3, 3)


def test_a_sequence_that_began_on_the_version_before_ends_in_plain_words(
    server: TritonServer, repository: Path, client: TritonClient
) -> None:
    publish_numbered(repository, 1, toys.RUNNING)
    toys.wait_for(lambda: {"name": "running", "version": "1", "state": "READY"} in server.index())
    ask(client, "running", sequence_id=7, sequence_start=True)
    publish_numbered(repository, 2, toys.RUNNING)
    units = set()

    def go_on() -> None:
        units.add(ask(client, "running", sequence_id=7)["unit"])

    with pytest.raises(InputError, match="sequence 7 to model 'running_onnx' must specify the START flag"):
        toys.wait_for(go_on)
    assert units == {1}
    assert ask(client, "running", sequence_id=7, sequence_start=True)["unit"] == 2


def test_a_version_before_that_is_taken_away_is_unloaded_and_the_new_one_goes_on(
    server: TritonServer, repository: Path, client: TritonClient
) -> None:
    publish_numbered(repository, 2)
    toys.wait_for(lambda: made_by(client)[-1] == 2)
    for name in ("onnx", "encode", "decode"):
        (repository / f"doubling_{name}" / "1").rename(repository.with_name(f"taken_{name}"))

    def only_the_new_one() -> bool:
        assert made_by(client) == (2, 2, 2)
        ready = [model["version"] for model in server.index() if model["state"] == "READY"]
        return ready == ["1", "2", "2", "2"]  # the ensemble and its steps

    toys.wait_for(only_the_new_one)
    assert lint(repository) == []
