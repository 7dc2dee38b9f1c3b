"""Starts a real Triton Inference Server on a model repository, and removes its files when it stops.

The server is NVIDIA's own when `tritonserver` is on PATH, as in NVIDIA's container, with that server's backends. Else
it is the unmodified core inside the PyPI package nvidia-pytriton, which has the `python` backend only: the folders of
`backends/` then replace the others under their names, so that both serve the same repository.
"""

import contextlib
import http.client
import json
import os
import re
import secrets
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import quote

from runtimes import plugins
from runtimes.errors import EngineError, MissingPackage
from runtimes.host.background_server import (
    EVERYWHERE,
    LOOPBACK,
    PACKAGE,
    BackgroundServer,
    answers,
    choose_ports,
    find_venv,
)
from runtimes.runtime import Backend

BACKEND = re.compile(r'^\s*backend\s*:\s*"([^"]+)"', re.MULTILINE)
USUAL = Backend(proxy="")  # the times of a server without a slower backend
# Interfaces by which a client could change the server, write to its disk or map memory of other processes.
CONTROL = ("model-repository", "shared-memory", "logging", "trace")
CONTROL_KEY = "slipway-control"
EVERY_MODEL = "*"
# Limit of one request over HTTP, where the server has the option; 2.51 has not; deploy/nginx.conf limits gRPC too.
HTTP_LIMIT, HTTP_BYTES = "--http-max-input-size", 16 << 20
# The stub's embedded interpreter ignores PYTHONPATH, so our model.py files read this variable and import
# `runtimes` from there: the server runs the same checkout as the program that started it.
SLIPWAY_PATH = "SLIPWAY_PATH"
PROBE = "import sys, sysconfig, numpy; print(*sys.version_info[:2], numpy.__version__.split('.')[0], sep='.'); " + (
    "print(sysconfig.get_path('purelib')); print(sysconfig.get_config_var('LIBDIR'))"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bundle:
    """The Triton core of nvidia-pytriton in a virtual environment, and the requirements of its Python stub."""

    venv: Path
    site: Path
    python_libraries: str
    python_version: str

    @property
    def core(self) -> Path:
        return self.site / "pytriton" / "tritonserver"

    @property
    def server(self) -> Path:
        return self.core / "bin" / "tritonserver"

    def copy_backends(self, folder: Path) -> None:
        """`folder` holds the python backend and the proxies of the others."""
        python = folder / "python"
        python.mkdir()
        stub = self.core / "python_backend_stubs" / self.python_version / "triton_python_backend_stub"
        # Copies, because Triton refuses a linked library ("escapes backend directory") for a proxy.
        for source in (*(self.core / "backends" / "python").glob("*.*"), stub):
            if source.is_file():
                shutil.copy(source, python)
        for name, backend in all_backends().items():
            source = PACKAGE / "triton" / "backends" / backend.proxy
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))

    def environment(self) -> dict[str, str]:
        """Variables that make the stub's interpreter find this environment and the server its libraries."""
        libraries = (str(self.site / "nvidia_pytriton.libs"), self.python_libraries, os.environ.get("LD_LIBRARY_PATH"))
        return {
            # The embedded interpreter looks for `python3` on PATH, and beside it for pyvenv.cfg.
            "PATH": os.pathsep.join((str(self.venv / "bin"), os.environ.get("PATH", ""))),
            "LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries)),
        }

    def arguments(self, backends: Path, complete: bool) -> Iterator[str]:
        """Arguments that the core needs and NVIDIA's container does not; `complete` where configs have all inputs."""
        yield f"--backend-directory={backends}"
        yield f"--cache-directory={self.core / 'caches'}"
        yield "--allow-gpu-metrics=false"
        if complete:
            yield "--disable-auto-complete-config"  # launches every stub once instead of twice


def find_bundle() -> Bundle:
    """The bundled server; `MissingPackage` if there is none, `EngineError` if its environment cannot run models."""
    venv = find_venv("SLIPWAY_TRITON_VENV", ".venv-triton")
    if not (venv / "bin" / "python3").exists():
        raise MissingPackage(
            f"expected a Triton server: `tritonserver` on PATH or nvidia-pytriton in {venv}, found neither; "
            "run: make triton"
        )
    return inspect_bundle(venv)


def inspect_bundle(venv: Path) -> Bundle:
    """The bundle in `venv`, as its interpreter reports it."""
    ran = subprocess.run([venv / "bin" / "python3", "-c", PROBE], capture_output=True, text=True, check=False)
    if ran.returncode:
        raise EngineError(f"{venv}: expected an environment with numpy, found {ran.stderr[-200:]}; run: make triton")
    version, site, libraries = ran.stdout.splitlines()
    python_version, _, numpy_major = version.rpartition(".")
    bundle = Bundle(venv=venv, site=Path(site), python_libraries=libraries, python_version=python_version)
    if not bundle.server.is_file():
        raise MissingPackage(f"{venv}: expected nvidia-pytriton in this environment, found none; run: make triton")
    # With numpy 2 this core's stub loads, reports READY, and reads zeros from every tensor.
    if int(numpy_major) >= 2:
        raise EngineError(f"{venv}: expected numpy 1 for Triton's Python stub, found {numpy_major}; run: make triton")
    return bundle


class TritonServer(BackgroundServer):
    """A context manager: inside it, a server is ready on `http_url`, `grpc_url` and `metrics_url` ("host:port").

    Ports that are None are chosen among the free ones. `models` loads only these (and their parts, or EVERY_MODEL) and
    later those of `load`; with `poll_s` the server looks for changed models that often; with `strict` a model
    that fails to load fails the start, without it the others are served. `log`, a file or a stream, gets the server's
    output. The control interfaces need the random `control_key`, unless they are
    `open_to_all`. `EngineError` if the server does not get ready.
    """

    name = "Triton"
    telling = ("UNAVAILABLE:", "error while loading", "Poll failed", "failed to load", "error: ")
    # A stub without its libpython never gets ready, and the server would wait for it.
    hopeless = ("error while loading shared libraries",)

    def __init__(
        self,
        repository: Path,
        *,
        http_port: int | None = None,
        grpc_port: int | None = None,
        metrics_port: int | None = None,
        host: str = LOOPBACK,
        models: Sequence[str] | None = None,
        poll_s: int | None = None,
        strict: bool = True,
        open_to_all: bool = False,
        log: Path | IO[bytes] | None = None,
        start_timeout_s: float | None = None,
    ) -> None:
        usual_s = max(backend.start_timeout_s for backend in used_backends(repository))
        super().__init__(log=log, start_timeout_s=usual_s if start_timeout_s is None else start_timeout_s)
        self.repository = repository
        self.host = host
        self.ports = (http_port, grpc_port, metrics_port)
        self.models = models
        self.poll_s = poll_s
        self.strict = strict
        self.control_key = "" if open_to_all else secrets.token_hex(16)
        self.http_url = self.grpc_url = self.metrics_url = ""

    @property
    def shared_memory_prefix(self) -> str:
        """The prefix of the names of the shared memory between the server and its Python stubs."""
        return self.folder.name if self.folder else ""

    @property
    def subject(self) -> str:
        return str(self.repository)

    def index(self) -> list[dict[str, str]]:
        """Every model of the server: name and, if it tried to load it, version, state, reason."""
        models: list[dict[str, str]] = json.loads(self._control("index", timeout_s=10))
        return models

    def load(self, model: str) -> None:
        """The server has loaded the model of the repository; if it cannot, `index` has the reason."""
        self._control(f"models/{quote(model, safe='')}/load", self.start_timeout_s)

    def unload(self, model: str) -> None:
        """The server no longer serves the model."""
        self._control(f"models/{quote(model, safe='')}/unload", self.start_timeout_s)

    def _control(self, path: str, timeout_s: float) -> bytes:
        """The answer to an empty request at this path of the server's repository interface."""
        with contextlib.closing(http.client.HTTPConnection(self.http_url, timeout=timeout_s)) as connection:
            # With urllib's default type, application/x-www-form-urlencoded, Triton 2.51 crashes on a body of 5 MiB.
            headers = {"Content-Type": "application/json", CONTROL_KEY: self.control_key}
            connection.request("POST", f"/v2/repository/{path}", "{}", headers)
            return connection.getresponse().read()

    def launch(self) -> None:
        ports = choose_ports(self.host, self.ports)
        reached = LOOPBACK if self.host == EVERYWHERE else self.host
        self.http_url, self.grpc_url, self.metrics_url = (f"{reached}:{port}" for port in ports)
        folder = self.make_folder()
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        environment.setdefault(SLIPWAY_PATH, str(PACKAGE.parent))
        if installed := shutil.which("tritonserver"):
            command = [installed]
        else:
            bundle = find_bundle()
            complete = not any(backend.completes_config for backend in used_backends(self.repository))
            bundle.copy_backends(folder)
            environment |= bundle.environment()
            command = [str(bundle.server), *bundle.arguments(folder, complete=complete)]
        if knows_option(command[0], HTTP_LIMIT, environment):
            command.append(f"{HTTP_LIMIT}={HTTP_BYTES}")
        self.start([*command, *self._arguments(ports, folder.name)], environment)

    def is_ready(self) -> bool:
        return answers(self.http_url, "/v2/health/ready") and answers(self.metrics_url, "/metrics")

    def _arguments(self, ports: Sequence[int], shared_memory_prefix: str) -> Iterator[str]:
        yield f"--model-repository={self.repository.absolute()}"
        for service, port in zip(("http", "grpc", "metrics"), ports, strict=True):
            yield f"--{service}-address={self.host}"
            yield f"--{service}-port={port}"
        yield f"--backend-config=python,shm-region-prefix-name={shared_memory_prefix}"
        yield f"--exit-timeout-secs={max(backend.exit_timeout_s for backend in used_backends(self.repository))}"
        if self.control_key:
            restricted = f"{','.join(CONTROL)}:{CONTROL_KEY}={self.control_key}"
            yield from (f"--http-restricted-api={restricted}", f"--grpc-restricted-protocol={restricted}")
        if self.models is not None:
            yield "--model-control-mode=explicit"
            yield from (f"--load-model={model}" for model in self.models)
        elif self.poll_s is not None:
            yield "--model-control-mode=poll"
            yield f"--repository-poll-secs={self.poll_s}"
        if not self.strict:
            yield "--exit-on-error=false"
            yield "--strict-readiness=false"


def knows_option(server: str, option: str, environment: Mapping[str, str]) -> bool:
    """Whether the server's help names the option; with an unknown one it would not start."""
    ran = subprocess.run([server, "--help"], env=environment, capture_output=True, text=True, check=False, timeout=60)
    return re.search(rf"{option}\b", ran.stdout + ran.stderr) is not None  # 2.51 prints it on stderr


def all_backends() -> dict[str, Backend]:
    """The backends of Triton that our own engines can replace, by name."""
    engines = {name: plugins.load("runtimes.engines", name, "RUNTIME") for name in plugins.names("runtimes.engines")}
    return {name: engine.backend for name, engine in engines.items() if engine.backend}


def used_backends(repository: Path) -> list[Backend]:
    """The usual backend, and those that the models of a repository name."""
    configs = (config.read_text("utf-8", "replace") for config in repository.glob("*/config.pbtxt"))
    names = {name for config in configs for name in BACKEND.findall(config)}
    return [USUAL, *(backend for name, backend in all_backends().items() if name in names)]
