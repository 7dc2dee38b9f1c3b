"""config.pbtxt in Triton's own protobuf schema: its messages, their text, and the fields that configs share."""

from pathlib import Path
from typing import Any

from runtimes.errors import ArtifactError, one_line, require
from runtimes.tensors import TensorSpec

CONFIG = "config.pbtxt"
TYPES = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "int64": "TYPE_INT64",
    "int32": "TYPE_INT32",
    "uint8": "TYPE_UINT8",
    "bool": "TYPE_BOOL",
}

Fields = dict[str, Any]  # of a message, by name; an enum's value is its name
ModelConfig = Any  # tritonclient.grpc.model_config_pb2.ModelConfig, which is imported when it is first needed


def schema() -> Any:
    """The module of Triton's messages."""
    return require("tritonclient.grpc.model_config_pb2", extra="export")


def message(fields: Fields) -> ModelConfig:
    """The message with these fields."""
    return require("google.protobuf.json_format", extra="export").ParseDict(fields, schema().ModelConfig())


def to_text(config: ModelConfig) -> str:
    """The message in protobuf's text format, in which it stands in config.pbtxt."""
    text_format = require("google.protobuf.text_format", extra="export")
    return str(text_format.MessageToString(config, use_short_repeated_primitives=True))


def read_config(model: Path) -> ModelConfig:
    """The parsed config.pbtxt of a model's folder; `ArtifactError` if there is none or Triton could not parse it."""
    text_format = require("google.protobuf.text_format", extra="export")
    path = model / CONFIG
    if not path.is_file():
        raise ArtifactError(f"expected {CONFIG}, found none; publish the model again")
    try:
        return text_format.Parse(path.read_text(encoding="utf-8"), schema().ModelConfig())
    except (text_format.ParseError, UnicodeDecodeError) as error:
        raise ArtifactError(f"expected a {CONFIG} that Triton can parse, found {one_line(error)}") from error


def has_config(model: Path, config: ModelConfig) -> bool:
    """Whether the model's config.pbtxt equals this message; its spelling does not matter."""
    try:
        return bool(read_config(model) == config)
    except ArtifactError:
        return False


def tensor(spec: TensorSpec) -> Fields:
    """A tensor without its batch axis; the other dynamic axes are -1."""
    described = {"name": spec.name, "data_type": TYPES[spec.dtype], "dims": dims(spec)}
    # Triton has no tensor without dims: one number per row travels as [batch, 1].
    return described if len(spec.shape) > 1 else described | {"dims": [1], "reshape": {"shape": []}}


def dims(spec: TensorSpec) -> list[int]:
    """Sizes without the batch, -1 for a dynamic axis; one number per row has none here and travels as [1]."""
    return [size if isinstance(size, int) else -1 for size in spec.shape[1:]]


def text(name: str) -> Fields:
    """A tensor of one text."""
    return {"name": name, "data_type": "TYPE_STRING", "dims": [1]}


def newest(count: int) -> Fields:
    """A version policy: so many of the newest versions are loaded."""
    return {"latest": {"num_versions": count}}


def instances(kind: str, count: int = 1) -> Fields:
    """Instance groups: one, of so many instances on CPU, GPU, or where the MODEL decides."""
    return {"instance_group": [{"count": count, "kind": f"KIND_{kind}"}]}


def parameters(**values: str) -> Fields:
    """The parameters of a config; none without values."""
    return {"parameters": {key: {"string_value": value} for key, value in values.items()}} if values else {}
