"""Units: the scored pieces of responses, chunks or tokens, and the score logs with them in the public format.

Shapes: U units, R responses, H heads, L layers.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.artifact import read_json
from runtimes.errors import InputError
from training.config import Config
from training.models.hallucination.settings import Head, heads_of, layers_of

HEAD_KEY = re.compile(r"\((\d+), ?(\d+)\)")
LAYER_KEY = re.compile(r"layer_(\d+)")
ECS, PKS = "prompt_attention_score", "parameter_knowledge_scores"


@dataclass(frozen=True, kw_only=True, slots=True)
class Units:
    """Features and labels of the units of many responses, response by response.

    ecs        float64 [U, H]: how similar a head's attended context is to the answer (external context score)
    pks        float64 [U, L]: how much a layer's feed-forward part changes the prediction (parametric knowledge score)
    labels     int64 [U], 1 for hallucinated
    lengths    int64 [U], tokens
    weights    float64 [U], the unit's share in its response, relative to the others'
    responses  int64 [U], ascending from 0 without a gap
    sources    a name for each of the R responses; responses to one source must not be split
    """

    heads: tuple[Head, ...]
    layers: tuple[int, ...]
    ecs: np.ndarray
    pks: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray
    weights: np.ndarray
    responses: np.ndarray
    sources: tuple[str, ...]

    def __post_init__(self) -> None:
        for name, values, columns in (("ECS", self.ecs, self.heads), ("PKS", self.pks, self.layers)):
            if values.shape != (len(self.labels), len(columns)):
                expected = [len(self.labels), len(columns)]
                raise InputError(f"expected {name} of shape {expected}, found {list(values.shape)}")
            if not np.isfinite(values).all():
                row, column = np.argwhere(~np.isfinite(values))[0]
                raise InputError(
                    f"expected finite features, found {values[row, column]} in {name} of unit {row}, "
                    f"{columns[column]}; remove the response or read it again"
                )

    @property
    def response_labels(self) -> np.ndarray:
        """int64 [R]: 1 if any unit of the response is hallucinated."""
        return np.maximum.reduceat(self.labels, self.starts)

    @property
    def starts(self) -> np.ndarray:
        """The first unit of every response."""
        return np.flatnonzero(np.diff(self.responses, prepend=-1))

    def average(self, values: np.ndarray) -> np.ndarray:
        """The weighted mean of `values` [U, ...] over each response [R, ...]."""
        weights = self.weights.reshape(-1, *[1] * (values.ndim - 1))
        totals = np.add.reduceat(self.weights, self.starts).reshape(-1, *[1] * (values.ndim - 1))
        return np.add.reduceat(values * weights, self.starts) / totals

    def take(self, chosen: np.ndarray) -> "Units":
        """The units of the responses where `chosen`, bool [R], is true."""
        kept = chosen[self.responses]
        numbers = np.cumsum(chosen) - 1
        arrays = {name: getattr(self, name)[kept] for name in ("ecs", "pks", "labels", "lengths", "weights")}
        sources = tuple(source for source, keep in zip(self.sources, chosen, strict=True) if keep)
        return replace(self, **arrays, responses=numbers[self.responses[kept]], sources=sources)

    def columns(self, heads: Sequence[Head], layers: Sequence[int]) -> "Units":
        """The features of these heads and layers; `InputError` names missing ones."""
        missing = [f"head {head}" for head in heads if head not in self.heads]
        missing += [f"layer {layer}" for layer in layers if layer not in self.layers]
        if missing:
            raise InputError(
                f"expected features of the {len(heads)} heads and {len(layers)} layers of the scorer, found none of "
                f"{', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}: they come from another model"
            )
        places = [self.heads.index(head) for head in heads], [self.layers.index(layer) for layer in layers]
        return replace(
            self, heads=tuple(heads), layers=tuple(layers), ecs=self.ecs[:, places[0]], pks=self.pks[:, places[1]]
        )


def read_log(path: Path) -> Units:
    """The units of a score log: a list of responses with `source_id` and `scores`, as ReDeEP writes it.

    Each score has `prompt_attention_score` by head, `parameter_knowledge_scores` by layer, `r_span` in tokens and
    `hallucination_label`. All must name the same heads and layers. `InputError` names the response that is wrong.
    """
    rows = read_json(path)
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path}: expected a list of responses with scores, found {type(rows).__name__}")
    rows = [row for row in rows if row.get("scores")]
    if not rows:
        raise InputError(f"{path}: expected responses with scores, found none with any")
    heads, layers = _columns(path, rows[0])
    ecs, pks, labels, lengths, responses = [], [], [], [], []
    for number, row in enumerate(rows):
        where = f"{path}, response {row.get('id', number)}"
        if not isinstance(row["scores"], list):
            raise InputError(f"{where}: expected a list of scores, found {ascii(row['scores'])[:80]}")
        for score in row["scores"]:
            ecs.append(_values(where, score, ECS, heads.values()))
            pks.append(_values(where, score, PKS, layers.values()))
            labels.append(_label(where, score))
            lengths.append(_length(where, score))
            responses.append(number)
    return Units(
        heads=tuple(heads),
        layers=tuple(layers),
        ecs=np.array(ecs, np.float64),
        pks=np.array(pks, np.float64),
        labels=np.array(labels, np.int64),
        lengths=np.array(lengths, np.int64),
        weights=np.ones(len(labels)),
        responses=np.array(responses, np.int64),
        sources=tuple(str(row.get("source_id", number)) for number, row in enumerate(rows)),
    )


def joined(one: Units, other: Units) -> Units:
    """The units of both; responses and sources of the other are numbered after those of the one."""
    names = ("ecs", "pks", "labels", "lengths", "weights")
    arrays: dict[str, Any] = {name: np.concatenate([getattr(one, name), getattr(other, name)]) for name in names}
    responses = np.concatenate([one.responses, other.responses + len(one.sources)])
    return replace(one, **arrays, responses=responses, sources=one.sources + other.sources)


def synthetic_units(config: Config, seed: int, count: int) -> Units:
    """Synthetic features: some heads and layers are more informative, and hallucinated chunks are longer."""
    rng = np.random.default_rng(seed)
    heads, layers = heads_of(config), layers_of(config)
    sizes = rng.integers(1, 5, count)
    responses = np.repeat(np.arange(count), sizes)
    labels = (rng.random(len(responses)) < 0.3).astype(np.int64)
    return Units(
        heads=heads,
        layers=layers,
        ecs=0.7 - 0.1 * labels[:, None] * rng.random(len(heads)) + 0.1 * rng.normal(size=(len(labels), len(heads))),
        pks=0.2 + 0.1 * labels[:, None] * rng.random(len(layers)) + 0.1 * rng.random((len(labels), len(layers))),
        labels=labels,
        lengths=rng.integers(10, 60, len(labels)) + 10 * labels,
        weights=np.ones(len(labels)),
        responses=responses,
        sources=tuple(map(str, range(count))),
    )


def require_both_labels(labels: np.ndarray, what: str) -> None:
    """`InputError` unless both labels occur: the AUC of one class is undefined."""
    found = sorted(set(labels.tolist()))
    if found != [0, 1]:
        raise InputError(
            f"AUC is undefined: expected hallucinated and faithful {what}, "
            f"found {len(labels)} with {'no label' if not found else f'label {found[0]} only'}"
        )


def _columns(path: Path, row: Mapping[str, Any]) -> tuple[dict[Head, str], dict[int, str]]:
    """Heads and layers in ascending order, each with its key in the log."""
    heads: dict[Head, str] = {}
    layers: dict[int, str] = {}
    score: Any = row["scores"][0] if isinstance(row["scores"], list) else {}
    for name in (ECS, PKS):
        if not isinstance(score, dict) or not isinstance(score.get(name), dict) or not score[name]:
            raise InputError(f"{path}: expected scores with '{name}', found {ascii(score)[:80]}")
    for key in score[ECS]:
        if not (match := HEAD_KEY.fullmatch(key)):
            raise InputError(f"{path}: expected heads such as '(25, 0)', found '{key}'")
        heads[int(match[1]), int(match[2])] = key
    for key in score[PKS]:
        if not (match := LAYER_KEY.fullmatch(key)):
            raise InputError(f"{path}: expected layers such as 'layer_0', found '{key}'")
        layers[int(match[1])] = key
    return dict(sorted(heads.items())), dict(sorted(layers.items()))


def _values(where: str, score: Any, name: str, keys: Any) -> list[float]:
    found = score.get(name) if isinstance(score, dict) else None
    if not isinstance(found, dict) or found.keys() != set(keys):
        unknown = sorted(set(found or ()) ^ set(keys))[:3] if isinstance(found, dict) else found
        raise InputError(f"{where}: expected '{name}' as in the first response, found a difference: {unknown}")
    values = [found[key] for key in keys]
    if not all(type(value) in (int, float) and math.isfinite(value) for value in values):
        raise InputError(f"{where}: expected finite numbers in '{name}', found {values[:3]}...")
    return values


def _label(where: str, score: Mapping[str, Any]) -> int:
    label = score.get("hallucination_label")
    if type(label) is not int or label not in (0, 1):
        raise InputError(f"{where}: expected a hallucination_label of 0 or 1, found {label!r}")
    return label


def _length(where: str, score: Mapping[str, Any]) -> int:
    span = score.get("r_span")
    if not isinstance(span, list) or len(span) != 2 or any(type(end) is not int for end in span) or span[0] > span[1]:
        raise InputError(f"{where}: expected r_span as [first, last] token, found {span!r}")
    return int(span[1] - span[0])
