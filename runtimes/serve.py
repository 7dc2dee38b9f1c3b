"""Serves a model repository with Triton, in the foreground, and picks up what is published meanwhile."""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from runtimes.errors import EngineError, InputError
from runtimes.host.background_server import LOOPBACK
from runtimes.host.cli import command, existing_folder, parser
from runtimes.triton.server import EVERY_MODEL, TritonServer
from runtimes.triton.stub_health import StubWatch
from runtimes.triton.version_watch import Seen, VersionWatch

POLL_S = 1
NOT_YET: Seen = ((), 0)


class Stopped(Exception):
    """SIGINT or SIGTERM has come."""


@command
def main(argv: list[str] | None = None) -> int:
    """Serves until SIGINT or SIGTERM (status 0) or until the server dies (status 1); not what does not verify (2)."""
    arguments = parser(
        "runtimes.serve",
        "Serves every model of a repository over HTTP and gRPC, and newly published versions within seconds.",
        "",
        "--repository model_repository --http-port 8000 --grpc-port 8001 --metrics-port 8002",
    )
    arguments.add_argument("--repository", type=Path, default=Path("model_repository"))
    arguments.add_argument("--host", default=LOOPBACK, help="address to listen at (default: %(default)s, this machine)")
    arguments.add_argument("--http-port", type=int, default=8000)
    arguments.add_argument("--grpc-port", type=int, default=8001)
    arguments.add_argument("--metrics-port", type=int, default=8002)
    arguments.add_argument(
        "--allow-control", action="store_true", help="let every client change log and trace settings and map memory"
    )
    arguments.add_argument(
        "--log", type=Path, help="keep Triton's own log in this file, 64 MiB and as much before; - is stderr"
    )
    arguments.add_argument(
        "--unverified",
        action="store_true",
        help="serve the files as they are, without comparing them with their manifests",
    )
    given = arguments.parse_args(argv)
    repository = existing_folder(given.repository, "models")
    if not any(repository.glob("*/config.pbtxt")):
        raise InputError(f"expected models in {repository}, found none; run: python -m export.all --target onnx")
    if given.host != LOOPBACK:
        print(f"warning: anyone who reaches {given.host} can use these models; Triton asks nobody", file=sys.stderr)
    versions = VersionWatch(repository, compare=not given.unverified)
    versions.look()
    for problem in versions.problems.values():
        raise InputError(f"{problem}; or serve it as it is with --unverified")
    ports = {name: getattr(given, name) for name in ("http_port", "grpc_port", "metrics_port")}
    log = sys.stderr.buffer if given.log == Path("-") else given.log
    more = {"open_to_all": given.allow_control, "log": log}
    server = TritonServer(repository, host=given.host, **ports, models=[EVERY_MODEL], strict=False, **more)
    with suppress(Stopped), stopping_on_signals(), server:
        watch(server, versions)
    return 0


def watch(server: TritonServer, versions: VersionWatch) -> None:
    """Prints where the server listens, then every model and every change; `EngineError` once the server has died.

    What appears or changes meanwhile is loaded; what does not fit its manifest is named and not loaded.
    """
    print(
        f"HTTP     http://{server.http_url}\ngRPC     {server.grpc_url}\nmetrics  http://{server.metrics_url}/metrics"
    )
    known: list[str] = []
    stubs = StubWatch(server.shared_memory_prefix)
    while server.running:
        for model in stubs.revive():
            print(f"{model}: its process died, loading it again", file=sys.stderr, flush=True)
        with suppress(OSError):  # a busy server may answer too late; it is asked again
            follow(server, versions)
            now = [" ".join(model.values()) for model in server.index()]
            for line in (line for line in now if line not in known):
                print(line, flush=True)
            known = now
        time.sleep(POLL_S)
    raise EngineError(f"expected Triton to run until it is stopped, it died: {server.failure()}")


def follow(server: TritonServer, versions: VersionWatch) -> None:
    """The server has loaded what is new in the repository and fits, and unloaded what is gone.

    It loads a model only when it is told to: by polling it would take what nobody compared.
    """
    waiting = versions.look()
    try:
        while waiting:
            tell(server, versions, waiting[0])
            waiting.pop(0)
    finally:  # the server may answer too late; whoever is left is looked at again
        versions.known |= dict.fromkeys(waiting, NOT_YET)


def tell(server: TritonServer, versions: VersionWatch, model: str) -> None:
    """The server has loaded or unloaded a model that has changed, or it is said why not."""
    if problem := versions.problems.get(model):
        print(f"not loaded: {problem}", file=sys.stderr, flush=True)
    elif model not in versions.known:
        server.unload(model)
    elif versions.holds_back(model):  # else old and new would be mixed, and an ensemble brings all its parts along
        versions.known[model] = NOT_YET
    else:
        server.load(model)


@contextmanager
def stopping_on_signals() -> Iterator[None]:
    """Inside, the first SIGINT or SIGTERM raises `Stopped`; more of them do not disturb the stopping."""

    def stop(*_: object) -> None:
        for each in signals:
            signal.signal(each, signal.SIG_IGN)
        raise Stopped

    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(each, stop) for each in signals]
    try:
        yield
    finally:
        for each, handler in zip(signals, before, strict=True):
            signal.signal(each, handler)


if __name__ == "__main__":
    sys.exit(main(None))
