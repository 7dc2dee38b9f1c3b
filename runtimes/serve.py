"""Serve a model repository with Triton in the foreground, and load newly published versions."""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from runtimes.errors import EngineError, InputError
from runtimes.host.background_server import LOOPBACK
from runtimes.host.cli import Parser, command, existing_folder, parser, repository_argument
from runtimes.triton.server import EVERY_MODEL, TritonServer
from runtimes.triton.stub_health import StubWatch
from runtimes.triton.version_watch import Seen, VersionWatch

POLL_S = 1
NOT_YET: Seen = ((), 0)


class Stopped(Exception):
    """SIGINT or SIGTERM was received."""


@command
def main(argv: list[str] | None = None) -> int:
    """Serve until SIGINT or SIGTERM (status 0) or until the server dies (1); status 2 for files that do not verify."""
    given = _parser().parse_args(argv)
    repository = existing_folder(given.repository, "models")
    if not any(repository.glob("*/config.pbtxt")):
        raise InputError(f"expected models in {repository}, found none; run: python -m export.all --target onnx")
    if given.host != LOOPBACK:
        print(f"warning: Triton has no authentication: anyone who reaches {given.host} can use the models",
              file=sys.stderr)  # fmt: skip
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
    """Print the server's addresses, then every model and every change; `EngineError` once the server has died.

    New and changed models are loaded; one that does not match its manifest is named and not loaded.
    """
    print(
        f"HTTP     http://{server.http_url}\ngRPC     {server.grpc_url}\nmetrics  http://{server.metrics_url}/metrics"
    )
    known: list[str] = []
    stubs = StubWatch(server.shared_memory_prefix)
    while server.running:
        for model in stubs.revive():
            print(f"{model}: its process died, loading it again", file=sys.stderr, flush=True)
        with suppress(OSError):  # a busy server may answer too late; the next round tries again
            follow(server, versions)
            now = [" ".join(model.values()) for model in server.index()]
            for line in (line for line in now if line not in known):
                print(line, flush=True)
            known = now
        time.sleep(POLL_S)
    raise EngineError(f"expected Triton to run until it is stopped, found it dead: {server.failure()}")


def follow(server: TritonServer, versions: VersionWatch) -> None:
    """The server has loaded new models and versions that verify, and unloaded removed ones.

    It does not poll the repository itself: it would load versions that were not compared with their manifests.
    """
    waiting = versions.look()
    try:
        while waiting:
            apply(server, versions, waiting[0])
            waiting.pop(0)
    finally:  # the server may answer too late; the rest is tried again in the next round
        versions.known |= dict.fromkeys(waiting, NOT_YET)


def apply(server: TritonServer, versions: VersionWatch, model: str) -> None:
    """The server has loaded or unloaded a model that changed, or stderr has the reason why not."""
    if problem := versions.problems.get(model):
        print(f"not loaded: {problem}", file=sys.stderr, flush=True)
    elif model not in versions.known:
        server.unload(model)
    elif versions.holds_back(model):  # else old and new would mix: Triton loads an ensemble with all its parts
        versions.known[model] = NOT_YET
    else:
        server.load(model)


def _parser() -> Parser:
    result = parser(
        "runtimes.serve",
        "Serve every model of a repository over HTTP and gRPC, and newly published versions within seconds.",
        "",
        "--repository model_repository --http-port 8000 --grpc-port 8001 --metrics-port 8002",
    )
    repository_argument(result)
    result.add_argument("--host", default=LOOPBACK, help="address to listen at (default: %(default)s, this machine)")
    for service, port in (("http", 8000), ("grpc", 8001), ("metrics", 8002)):
        result.add_argument(f"--{service}-port", type=int, default=port, help=f"of {service} (default: %(default)s)")
    result.add_argument(
        "--allow-control", action="store_true", help="let every client change log and trace settings and map memory"
    )
    result.add_argument(
        "--log", type=Path, help="file of Triton's log, rotated at 64 MiB; - is stderr (default: the log is not kept)"
    )
    result.add_argument(
        "--unverified", action="store_true", help="serve the files without comparing them with their manifests"
    )
    return result


@contextmanager
def stopping_on_signals() -> Iterator[None]:
    """Inside, the first SIGINT or SIGTERM raises `Stopped`; further signals are ignored."""

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
