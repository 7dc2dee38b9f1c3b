"""Pipeline: a request becomes tensors, tensors become an answer. Written once, used in training, serving and Triton."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from runtimes import plugins
from runtimes.artifact import ASSETS, Artifact
from runtimes.errors import EngineError, InputError, one_line, unknown_name
from runtimes.runtime import Runtime

Schema = dict[str, Any]  # a JSON Schema (2020-12)

REQUEST_BYTES = 4 << 20  # of one request in JSON; the parsed form of more would take a hundred megabytes


class Pipeline(ABC):
    """Encodes requests and decodes outputs for one model. JSON objects in, JSON objects out.

    `config` is the checkpoint's config; `assets` is the folder with files such as a tokenizer, if the model has any.

    generates  whether it answers only by `runtimes.generate`, with many runs of its engine
    embeds     whether it turns `{"text": ...}` into the unit vector by which collections are searched
    cascade    opens the model's parts around a store, if it has any
    """

    generates: ClassVar[bool] = False
    embeds: ClassVar[bool] = False
    cascade: ClassVar[Callable[..., Any] | None] = None

    def __init__(self, config: Mapping[str, Any], assets: Path) -> None:
        self.config = config
        self.assets = assets

    @abstractmethod
    def encode(self, requests: Sequence[Any]) -> dict[str, np.ndarray]:
        """Tensors for a batch of requests, one row each. `InputError` names the wrong request and its fault."""

    @abstractmethod
    def decode(self, outputs: Mapping[str, np.ndarray]) -> list[Any]:
        """One JSON-serialisable answer per row of the outputs."""

    def respond(self, runtime: Runtime, requests: Sequence[Any]) -> list[Any]:
        """The answers of an open runtime to a batch of requests; a recurrent model starts from zero."""
        return self.decode(runtime.fresh(self.encode(requests)))

    @abstractmethod
    def example(self) -> Any:
        """A valid request, short enough to read."""

    def schema(self) -> Schema:
        """The JSON Schema (2020-12) that every valid request satisfies; `encode` checks the rest."""
        return {"type": "object"}


def open_pipeline(artifact: Artifact, folder: Path) -> Pipeline:
    """The pipeline of an artifact in `folder`."""
    return find_pipeline(artifact.pipeline)(artifact.config, folder / ASSETS)


def all_pipelines() -> dict[str, type[Pipeline]]:
    """Every pipeline there is, by name: those that the packages in `runtimes.pipelines` declare in `PIPELINES`."""
    packages = plugins.names("runtimes.pipelines")
    declared = (plugins.load("runtimes.pipelines", package, "PIPELINES") for package in packages)
    return {name: pipeline for pipelines in declared for name, pipeline in pipelines.items()}


def find_pipeline(name: str) -> type[Pipeline]:
    """The pipeline of this name; `InputError` names the nearest one."""
    pipelines = all_pipelines()
    if name not in pipelines:
        raise unknown_name(
            "pipeline", name, pipelines, "install the plug-in that declares it, or export the model again"
        )
    return pipelines[name]


def refuse_no_requests(requests: Sequence[Any]) -> None:
    """`InputError` for a batch without a request."""
    if not requests:
        raise InputError("expected at least one request, found none")


def parse_request(text: bytes, where: str) -> Any:
    """The JSON value of a request; `InputError` for one that is too long, too deep, not UTF-8 or no JSON."""
    if len(text) > REQUEST_BYTES:
        raise InputError(f"{where}: expected at most {REQUEST_BYTES} bytes, found {len(text)}; send less at once")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError is also that of bytes which are not UTF-8
        raise InputError(f"{where}: expected JSON in UTF-8, found {one_line(error)}") from error


def write_answer(answer: Any) -> bytes:
    """An answer as JSON, the same bytes wherever it is written; `EngineError` for one with NaN or infinity in it.

    Numbers are rounded to float32, as the outputs they come from: the last bits of NumPy's exp in float64 are not those
    of another version of NumPy, and a server's is older than a client's.
    """
    try:
        return json.dumps(_narrowed(answer), ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:
        raise EngineError(f"expected an answer of finite numbers, found {one_line(error)}") from error


def _narrowed(value: Any) -> Any:
    if isinstance(value, float):
        return float(np.float32(value))
    if isinstance(value, dict):
        return {name: _narrowed(part) for name, part in value.items()}
    return [_narrowed(part) for part in value] if isinstance(value, list | tuple) else value


# Parts of the JSON Schema of a request ------------------------------------------------------------------------------

TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}


def real(low: float, high: float) -> Schema:
    """A number from `low` to `high`, both allowed."""
    return {"type": "number", "minimum": low, "maximum": high}


def whole(low: int, high: int | None = None) -> Schema:
    """An integer from `low` to `high`; None is no upper bound."""
    return {"type": "integer", "minimum": low} | ({} if high is None else {"maximum": high})


def choice(values: Sequence[str]) -> Schema:
    """One of these texts."""
    return {"enum": list(values)}


def array(items: Schema, least: int = 0, most: int | None = None) -> Schema:
    """From `least` to `most` items of one kind; None is no upper bound."""
    return {"type": "array", "items": items, "minItems": least} | ({} if most is None else {"maxItems": most})


def record(needed: Mapping[str, Schema], more: Mapping[str, Schema] | None = None) -> Schema:
    """An object with all of `needed`, some or none of `more` (null is none), and nothing else."""
    optional = {name: {"anyOf": [schema, {"type": "null"}]} for name, schema in (more or {}).items()}
    return {
        "type": "object",
        "properties": {**needed, **optional},
        "required": list(needed),
        "additionalProperties": False,
    }
