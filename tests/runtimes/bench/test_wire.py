"""The protocol between checkouts: this version measures with the worker of 0.1, and 0.1 with the worker of this one."""

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from runtimes.bench import wire
from runtimes.bench.measure import CHECKOUT, Worker, worker_module
from runtimes.bench.worker import ACTS
from runtimes.errors import EngineError
from runtimes.repository import find
from tests.toys import gone

# What version 0.1 sends, recorded, and the fields that it takes an answer to have: no more and no less.
RECORDED = [
    ({"do": "prepare", "sizes": {"batch": 1, "time": 1}}, {"provider", "first_call_s", "warmup_s", "warmup_calls"}),
    ({"do": "one_by_one", "seconds": 0.01}, "window"),
    ({"do": "side_by_side", "lanes": 2, "seconds": 0.01}, "window"),
    ({"do": "arriving", "rate_per_s": 500.0, "seconds": 0.02, "seed": [0, 1]}, "window"),
]
WINDOW_FIELDS = {"samples_s", "wall_s", "cpu_s", "refused", "device_s", "rate_per_s", "service_s", "alone_s", "busy_s",
                 "late"}  # fmt: skip


@pytest.fixture
def root(gru_repository: Path) -> Path:
    return find(gru_repository, "policy_gru_onnx")


@pytest.fixture
def older_checkout(tmp_path: Path) -> Path:
    """A checkout whose worker is that of version 0.1, at its place there."""
    (tmp_path / "runtimes").mkdir()
    (tmp_path / "runtimes" / "__init__.py").touch()
    shutil.copy(Path(__file__).with_name("worker_of_0_1.py"), tmp_path / "runtimes" / "worker.py")
    return tmp_path


def test_this_version_measures_with_the_worker_of_0_1(root: Path, older_checkout: Path) -> None:
    assert worker_module(older_checkout) == "runtimes.worker"
    worker = Worker(root, {"device": "cpu", "threads": 1}, older_checkout)
    try:
        measurement = worker.prepare({"batch": 1, "time": 2})
        assert (measurement.provider, measurement.warmup_calls) == ("0.1", 3)
        assert worker.window(wire.closed_loop(0.25)).samples_s == [0.25] * 3
        assert worker.window(wire.concurrent(4, 0.5)).samples_s == [0.5] * 4
        assert worker.window(wire.open_loop(7.0, 0.5, [0, 3])).rate_per_s == 7.0
    finally:
        worker.close()
    assert gone(worker.pid)


def test_a_word_that_0_1_does_not_have_ends_its_worker(root: Path, older_checkout: Path) -> None:
    worker = Worker(root, {}, older_checkout)
    with pytest.raises(EngineError, match="the engine's process died"):
        worker.window({"do": "closed_loop", "seconds": 0.0})


@pytest.fixture
def conversation(root: Path) -> Iterator[Any]:
    """Sends a request to the worker of this checkout, started as version 0.1 starts it; the answer."""
    assert (CHECKOUT / "runtimes" / "worker.py").is_file(), "0.1 looks for this file"
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "runtimes.worker", str(theirs.fileno())], pass_fds=[theirs.fileno()], cwd=CHECKOUT
        )
    with ours, ours.makefile("r") as answers:

        def send(request: Mapping[str, Any]) -> Any:
            ours.sendall(json.dumps(request).encode() + b"\n")
            return json.loads(answers.readline())

        yield send
    process.wait(10)


def test_version_0_1_measures_with_the_worker_of_this_one(root: Path, conversation: Any) -> None:
    opened = conversation({"root": str(root), "options": {"device": "cpu", "threads": 1}})["ok"]
    assert {name: opened[name] for name in ("engine", "remote", "protocol")} == {
        "engine": "onnxruntime",
        "remote": False,
        "protocol": 1,
    }
    assert opened["load_s"] > 0
    for request, fields in RECORDED:
        answer = conversation(request)["ok"]
        assert set(answer) == (WINDOW_FIELDS if fields == "window" else fields)
    assert answer["rate_per_s"] == 500.0


def test_the_words_are_those_of_0_1() -> None:
    """A renamed word would leave each version working with itself only."""
    sizes = {"batch": 1, "time": 1}
    requests = [wire.prepare(sizes), wire.closed_loop(0.01), wire.concurrent(2, 0.01)]
    assert [*requests, wire.open_loop(500.0, 0.02, [0, 1])] == [request for request, _ in RECORDED]
    assert set(ACTS) == {request["do"] for request, _ in RECORDED}
    assert wire.PROTOCOL == 1
    opening = wire.opening(Path("/a/b"), {"device": "cpu"})
    assert opening == {"root": "/a/b", "options": {"device": "cpu"}}
