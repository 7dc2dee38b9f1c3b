"""Backend: how Triton serves the artifacts of one engine. Each file of `export.triton.backends` declares one."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from export.triton.scheduling import Scheduling
from export.triton.schema import Fields, ModelConfig
from runtimes import plugins
from runtimes.artifact import Artifact

Check: TypeAlias = Callable[[Path, Artifact, ModelConfig, Path], Iterator[str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Backend:
    """How Triton serves the artifacts of one engine.

    name            of the engine, and of Triton's backend
    file            what Triton opens in a version folder
    platforms       older names of the backend, which the linter accepts
    config_names_platform   whether its configs name the first of `platforms`, as Triton needs it, and not the backend
    gpu_only        whether its models run on a GPU only
    cpu_parameters  of a config, where the model runs on a CPU
    takes_tensors   whether the served model has the tensors of the signature, as an ensemble needs
    config          the fields of config.pbtxt for (artifact, scheduling), if they do not follow from the signature
    check           lines for (version, artifact, config, version folder on the server) instead of the linter's own
    server_paths    the absolute paths that `file`, a JSON object, names by key, for a version folder on the server
    """

    name: str
    file: str
    platforms: tuple[str, ...] = ()
    config_names_platform: bool = False
    gpu_only: bool = False
    cpu_parameters: Mapping[str, str] = field(default_factory=dict)
    takes_tensors: bool = True
    config: Callable[[Artifact, Scheduling], Fields] | None = None
    check: Check | None = None
    server_paths: Callable[[Path], Mapping[str, str]] = lambda version: {}


def all_backends() -> dict[str, Backend]:
    """Every backend there is, by name."""
    names = plugins.names("export.triton.backends")
    return {name: plugins.load("export.triton.backends", name, "BACKEND") for name in names}


def find_backend(engine: str) -> Backend | None:
    """The backend that serves the artifacts of an engine, or None: Triton has none for them."""
    return all_backends().get(engine)


def backend_of(config: ModelConfig) -> str:
    """The name of the backend that runs a config's model, also where the config gives an older name of it."""
    older = {platform: backend.name for backend in all_backends().values() for platform in backend.platforms}
    return str(older.get(config.platform, config.platform) if config.platform else config.backend)
