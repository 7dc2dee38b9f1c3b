"""The pieces of a JSON Schema (2020-12) that requests are made of."""

from collections.abc import Mapping, Sequence
from typing import Any

Schema = dict[str, Any]

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
