"""A Triton server starts or reports why not, and leaves no process or file, however it ends."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from export.triton.repository import drafting, publish, publish_ensemble
from runtimes import serve
from runtimes.artifact import digests
from runtimes.errors import EngineError, InputError, MissingPackage
from runtimes.host.background_server import choose_ports
from runtimes.host.memory_sampler import tree
from runtimes.triton.server import (
    EVERY_MODEL,
    HTTP_LIMIT,
    SLIPWAY_PATH,
    TritonServer,
    find_bundle,
    knows_option,
)
from runtimes.triton.stub_health import STUB, is_zombie
from runtimes.triton.version_watch import VersionWatch
from tests import toys

ROOT = Path(__file__).parents[3]

pytestmark = toys.needs_server()


def left_behind(needle: str) -> list[str]:
    """Processes whose command line names `needle`, and shared memory and temporary folders so named."""
    lines = (path.read_bytes().replace(b"\0", b" ").decode(errors="replace") for path in command_lines())
    files = (path.name for folder in ("/dev/shm", tempfile.gettempdir()) for path in Path(folder).iterdir())
    return [line for line in (*lines, *files) if needle in line]


def command_lines() -> Iterator[Path]:
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            (folder / "cmdline").read_bytes()
            yield folder / "cmdline"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A repository with one model, and no pipeline."""
    repository = tmp_path / "model_repository"
    with drafting(repository) as draft:
        publish(draft, toys.make(draft, toys.DOUBLING), repository)
    return repository


def test_nothing_is_left_of_a_server_that_was_closed(small: Path) -> None:
    with TritonServer(small) as server:
        assert server.folder
        name = server.folder.name
        assert left_behind(name)
        assert [model["state"] for model in server.index()] == ["READY"]
    assert left_behind(name) == []
    assert "Started HTTPService" in server.log_tail(100)


PARENT = """
import os, pathlib, sys
sys.path.insert(0, {root!r})
from runtimes.triton.server import HTTP_LIMIT, TritonServer, find_bundle, knows_option
with TritonServer(pathlib.Path({repository!r})) as server:
    print(server.folder.name, flush=True)
    sys.stdin.read()
"""


def test_nothing_is_left_of_a_server_whose_parent_was_killed(small: Path) -> None:
    program = PARENT.format(root=str(ROOT), repository=str(small))
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout
        name = parent.stdout.readline().decode().strip()
        assert left_behind(name)
        parent.kill()
    toys.wait_for(lambda: not left_behind(name))


def test_a_server_ends_by_itself_when_its_guard_is_killed(small: Path) -> None:
    with TritonServer(small) as server:
        assert server.folder
        name = server.folder.name
        _, *started = tree(server.pid)
        assert len(started) >= 2, "Triton and a stub"
        os.kill(server.pid, signal.SIGKILL)
        toys.wait_for(lambda: all(toys.gone(pid) or is_zombie(pid) for pid in started), timeout_s=30)
    assert left_behind(name) == []


def test_a_model_that_does_not_load_fails_the_start_with_its_reason(small: Path) -> None:
    (small / "doubling_onnx" / "1" / "model.onnx").write_bytes(b"not a model")
    server = TritonServer(small)
    with pytest.raises(EngineError, match=r"doubling_onnx.*model\.onnx: expected sha256 .* found .*make it again"):
        server.__enter__()
    assert server.folder
    assert left_behind(server.folder.name) == []


def test_without_strictness_the_other_models_are_served(small: Path) -> None:
    (small / "broken" / "1").mkdir(parents=True)
    with TritonServer(small, strict=False) as server:
        states = {model["name"]: model.get("state") for model in server.index()}
    assert states == {"broken": None, "doubling_onnx": "READY"}


def test_only_the_models_asked_for_are_loaded(small: Path) -> None:
    (small / "broken" / "1").mkdir(parents=True)
    with TritonServer(small, models=["doubling_onnx"]) as server:
        assert [model for model in server.index() if "state" in model] == [
            {"name": "doubling_onnx", "version": "1", "state": "READY"}
        ]


def test_a_server_that_takes_too_long_is_stopped(small: Path) -> None:
    server = TritonServer(small, start_timeout_s=0)
    with pytest.raises(EngineError, match="expected Triton to be ready within 0 s"):
        server.__enter__()
    assert server.folder
    assert left_behind(server.folder.name) == []


def test_a_taken_port_is_an_error_before_anything_starts(small: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"expected a free port at 127.0.0.1:{port}, found .*in use"):
            TritonServer(small, grpc_port=port).__enter__()


def test_a_missing_server_is_an_error_that_says_how_to_get_one(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIPWAY_TRITON_VENV", str(small))
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(MissingPackage, match=r"expected a Triton server.*run: make triton"):
        TritonServer(small).__enter__()


def serving(repository: Path) -> list[str]:
    """A command that serves the repository at free ports, which are its last arguments."""
    ports = zip(("http", "grpc", "metrics"), choose_ports("127.0.0.1", (None, None, None)), strict=True)
    arguments = (f"--{service}-port={port}" for service, port in ports)
    return [sys.executable, "-m", "runtimes.serve", "--repository", str(repository), *arguments]


def test_a_server_is_told_of_a_limit_only_if_it_knows_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newer = tmp_path / "tritonserver"
    newer.write_text(f"#!/bin/sh\n[ $1 = --help ] && echo '  {HTTP_LIMIT} <integer>' || echo error: told $*\n")
    newer.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    with pytest.raises(EngineError, match=rf"error: told {HTTP_LIMIT}=16777216 --model-repository"):
        TritonServer(tmp_path).__enter__()
    monkeypatch.setenv("PATH", "/bin")
    bundle = find_bundle()
    assert knows_option(str(bundle.server), "--http-port", bundle.environment())
    assert not knows_option(str(bundle.server), HTTP_LIMIT, bundle.environment())  # with it, 2.51 would not start


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_serve_says_what_it_serves_and_stops_cleanly(small: Path, sign: signal.Signals) -> None:
    command = serving(small)
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as started:
        assert started.stdout
        lines = [started.stdout.readline().strip() for _ in range(4)]
        started.send_signal(sign)
        _, errors = started.communicate(timeout=120)
    assert lines[0] == f"HTTP     http://127.0.0.1:{command[-3].rpartition('=')[2]}"
    assert lines[3] == "doubling_onnx 1 READY"
    assert (started.returncode, errors) == (0, "")


def test_the_servers_own_log_goes_to_stderr_if_asked(small: Path) -> None:
    command = [*serving(small), "--log", "-"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as started:
        assert started.stdout
        while "READY" not in (line := started.stdout.readline()):
            assert line
        with drafting(small) as draft:
            artifact = toys.make(draft, toys.DOUBLING, key="new")
            (draft / "model.onnx").write_bytes(b"no model, though the one that the manifest means")
            artifact = replace(artifact, files=digests(draft))
            artifact.save(draft)
            publish(draft, artifact, small)
        while "2 UNAVAILABLE" not in (line := started.stdout.readline()):
            assert line
        started.send_signal(signal.SIGTERM)
        _, errors = started.communicate(timeout=120)
    assert started.returncode == 0
    assert "Started HTTPService" in errors
    assert "failed to load 'doubling_onnx' version 2" in errors


def wrong_version(folder: Path) -> Path:
    """A version with a model that Triton could load, but that is not the one in the manifest."""
    toys.make(folder, toys.DOUBLING)
    onnx = folder / "model.onnx"
    onnx.write_bytes(onnx.read_bytes().replace(b"factor", b"fact0r"))
    return folder


def test_serve_loads_a_new_version_only_if_it_is_the_published_one(small: Path, tmp_path: Path) -> None:
    model = small / "doubling_onnx"
    with subprocess.Popen(
        serving(small), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as started:
        assert started.stdout
        assert started.stderr
        while "doubling_onnx 1 READY" not in (line := started.stdout.readline()):
            assert line
        (stub,) = stubs_of(small)
        os.kill(stub, signal.SIGKILL)
        assert "its process died" in started.stderr.readline()
        toys.wait_for(lambda: stubs_of(small) not in ([], [stub]))
        wrong_version(tmp_path / "wrong").rename(model / "2")
        assert started.stderr.readline().startswith(f"not loaded: {model / '2' / 'model.onnx'}: expected sha256 ")
        with drafting(small) as draft:
            publish(draft, toys.make(draft, toys.DOUBLING, factor=3.0, key="new"), small)
        lines = []
        while "doubling_onnx 3 READY" not in (line := started.stdout.readline()):
            assert line
            lines.append(line)
        started.send_signal(signal.SIGTERM)
        _, errors = started.communicate(timeout=120)
    assert not any("doubling_onnx 2" in line for line in lines)
    assert (started.returncode, errors) == (0, "")


def test_an_ensemble_goes_on_as_it_was_until_every_part_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SLIPWAY_PATH, str(toys.checkout_with_pipeline(tmp_path / "source")))
    repository = tmp_path / "model_repository"

    def publish_toy(factor: float) -> Path:
        with toys.known_pipeline(tmp_path / "pipelines"), drafting(repository) as draft:
            artifact = toys.make(draft, toys.DOUBLING, factor=factor, key=f"of {factor}")
            version = publish(draft, artifact, repository)
            publish_ensemble(artifact, repository)
            return version

    publish_toy(2.0)
    versions = VersionWatch(repository)
    versions.look()
    with TritonServer(repository, models=[EVERY_MODEL]) as server:
        onnx = publish_toy(3.0) / "model.onnx"
        good = onnx.read_bytes()
        onnx.write_bytes(good.replace(b"factor", b"fact0r"))
        (repository / "doubling" / "config.pbtxt").touch()
        serve.follow(server, versions)
        assert {model["version"] for model in server.index()} == {"1"}
        assert toys.ask(server, "doubling", '{"x": [[1, 2, 3]]}')["last"] == [2.0, 4.0, 6.0]
        onnx.write_bytes(good)
        serve.follow(server, versions)
        assert toys.ask(server, "doubling", '{"x": [[1, 2, 3]]}')["last"] == [3.0, 6.0, 9.0]


def stubs_of(repository: Path) -> list[int]:
    """The processes of Python models in the repository."""
    lines = ((path, path.read_bytes().decode(errors="replace")) for path in command_lines())
    return [int(path.parent.name) for path, line in lines if STUB in line.split("\0")[0] and str(repository) in line]


def test_serve_does_not_start_with_a_file_that_is_not_the_published_one(small: Path) -> None:
    damaged = small / "doubling_onnx" / "1" / "model.onnx"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    asked = subprocess.run(serving(small), cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert (asked.returncode, asked.stdout) == (2, "")
    assert asked.stderr.startswith(f"error: {damaged}: expected sha256 ")
    assert asked.stderr.count("\n") == 1


def test_serve_refuses_a_repository_without_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert serve.main(["--repository", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: expected models in {tmp_path}, found none; run: ")
