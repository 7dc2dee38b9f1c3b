"""The scorer: which heads and layers count, and how much. Chosen by ranking and a grid, not by gradients.

Score of a unit: m * minmax(sum of PKS over layers) - alpha * minmax(sum of ECS over heads); of a response: the mean.
Source: Sun et al., ReDeEP, ICLR 2025; the settings published there choose on the data they are judged on.

Shapes: U units, R responses, H heads, L layers.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from runtimes.errors import InputError
from training.config import Metrics
from training.models.hallucination.metrics import (
    at_threshold,
    auc,
    best_threshold,
    correlation,
    intervals,
    mutual_information,
)
from training.models.hallucination.settings import Head
from training.models.hallucination.units import Units, require_both_labels

RATIOS = (
    0.0,
    0.1,
    0.2,
    0.3,
    0.4,
    0.6,
    0.8,
    1.0,
    1.2,
    1.4,
    1.6,
    2.0,
    3.0,
    5.0,
)  # alpha / m: all that a ranking depends on
PKS_ONLY, ECS_ONLY = (1.0, 0.0), (0.0, 1.0)
Bounds = tuple[float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One selection of heads and layers with the bounds that map their sums to 0..1."""

    heads: tuple[Head, ...]
    layers: tuple[int, ...]
    m: float
    alpha: float
    ecs_bounds: Bounds
    pks_bounds: Bounds

    def score(self, units: Units) -> np.ndarray:
        """[U], higher for what is likelier hallucinated."""
        own = units.columns(self.heads, self.layers)
        pks = scaled(own.pks.sum(1), self.pks_bounds)
        return self.m * pks - self.alpha * scaled(own.ecs.sum(1), self.ecs_bounds)

    @property
    def magnification(self) -> float:
        """How much larger than an error of every feature that of the score can be."""
        return abs(self.m) * len(self.layers) / _width(self.pks_bounds) + abs(self.alpha) * len(self.heads) / _width(
            self.ecs_bounds
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Scorer:
    """Members whose scores are averaged; the bounds of a response's score, and the one from which on it is called."""

    members: tuple[Member, ...]
    bounds: Bounds
    threshold: float

    @property
    def heads(self) -> tuple[Head, ...]:
        return tuple(sorted({head for member in self.members for head in member.heads}))

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted({layer for member in self.members for layer in member.layers}))

    @property
    def magnification(self) -> float:
        """How much larger than an error of every feature that of a response's score can be."""
        return float(np.mean([member.magnification for member in self.members])) / _width(self.bounds)

    def score(self, units: Units) -> np.ndarray:
        """[U]: the score of each unit, mapped as a response's."""
        return scaled(np.mean([member.score(units) for member in self.members], axis=0), self.bounds)

    def judge(self, units: Units) -> np.ndarray:
        """[R]: the score of each response, 0..1 on the responses it was fitted to."""
        return units.average(self.score(units))

    def calls(self, scores: np.ndarray) -> np.ndarray:
        """bool [R]: which of these responses are called hallucinated; as served, where a score ends at 0 and at 1."""
        called: np.ndarray = scores.clip(0, 1) >= self.threshold
        return called


def scaled(values: np.ndarray, bounds: Bounds) -> np.ndarray:
    """`values` with the bounds at 0 and 1; all 0 where the bounds are one."""
    return (values - bounds[0]) / _width(bounds)


def _width(bounds: Bounds) -> float:
    return (bounds[1] - bounds[0]) or 1.0


def bounds_of(values: np.ndarray) -> Bounds:
    """The smallest and the largest value."""
    return float(values.min()), float(values.max())


def rank(units: Units, select: str) -> tuple[list[int], list[int]]:
    """Columns of heads and of layers, best first, by AUC or by mutual information with the labels.

    Context should be used less where something is hallucinated, knowledge more: what points the other way comes last.
    """
    faithful = 1 - units.labels

    def worth(labels: np.ndarray, values: np.ndarray) -> float:
        area = auc(labels, values)
        if select == "auc":
            return area
        return float(np.sign(area - 0.5)) * mutual_information(labels, values)

    if select not in ("auc", "mi"):
        raise InputError(f"--set select: expected auc or mi, found '{select}'")
    return (
        _best_first([worth(faithful, column) for column in units.ecs.T]),
        _best_first([worth(units.labels, column) for column in units.pks.T]),
    )


def _best_first(values: list[float]) -> list[int]:
    order: list[int] = np.argsort(values, kind="stable")[::-1].tolist()
    return order


def member(units: Units, heads: list[int], layers: list[int], m: float, alpha: float) -> Member:
    """A member of these columns, with bounds from these units."""
    return Member(
        heads=tuple(units.heads[i] for i in heads),
        layers=tuple(units.layers[i] for i in layers),
        m=m,
        alpha=alpha,
        ecs_bounds=bounds_of(units.ecs[:, heads].sum(1)),
        pks_bounds=bounds_of(units.pks[:, layers].sum(1)),
    )


def complete(units: Units, members: tuple[Member, ...]) -> Scorer:
    """A scorer of these members, with bounds and threshold from these units."""
    raw = Scorer(members=members, bounds=(0.0, 1.0), threshold=0.0).judge(units)
    bounds = bounds_of(raw)
    threshold = best_threshold(units.response_labels, scaled(raw, bounds))
    return Scorer(members=members, bounds=bounds, threshold=threshold)


def fit_published(units: Units, settings: Mapping[str, Any]) -> Scorer:
    """The scorer of these units with `top_n`, `top_k`, `alpha` and `m` as they stand."""
    require_both_labels(units.labels, "units")
    require_both_labels(units.response_labels, "responses")
    heads, layers = rank(units, settings["select"])
    chosen = heads[: settings["top_n"]], layers[: settings["top_k"]]
    return complete(units, (member(units, *chosen, settings["m"], settings["alpha"]),))


def fit(units: Units, settings: Mapping[str, Any]) -> Scorer:
    """The scorer of these units by `settings["fit"]`: with given numbers, or with those that do best on folds.

    With an `ensemble` above 1, each member after the first is fitted to about 70 % of the responses.
    """
    if settings["fit"] == "published":
        return fit_published(units, settings)
    if settings["fit"] != "grid":
        raise InputError(f"--set fit: expected grid or published, found '{settings['fit']}'")
    require_both_labels(units.labels, "units")
    require_both_labels(units.response_labels, "responses")
    rng = np.random.default_rng(settings["seed"])
    members = [fit_member(units, settings)]
    while len(members) < settings["ensemble"]:
        sample = units.take(rng.random(len(units.sources)) < 0.7)
        if len(set(sample.response_labels.tolist())) == 2:
            members.append(fit_member(sample, settings))
    return complete(units, tuple(members))


def fit_member(units: Units, settings: Mapping[str, Any]) -> Member:
    """The member whose numbers of heads and layers and whose ratio do best on folds held out by source."""
    parts = [(units.take(train), units.take(~train)) for train in folds(units, settings["folds"], settings["seed"])]
    ranks = [rank(train, settings["select"]) for train, _ in parts]
    tables = [grid(*part, *ranked, settings) for part, ranked in zip(parts, ranks, strict=True)]
    if not tables:
        raise InputError("expected folds with both labels, found none; give more responses or fewer --folds")
    mean = np.mean(tables, axis=0)
    n, k, mix = np.unravel_index(int(mean.argmax()), mean.shape)  # the first, hence smallest, of equals
    heads, layers = rank(units, settings["select"])
    return member(units, heads[: n + 1], layers[: k + 1], *mixes()[mix])


@cache
def mixes() -> list[tuple[float, float]]:
    """Pairs (m, alpha)."""
    return [ECS_ONLY, PKS_ONLY, *((1.0, ratio) for ratio in RATIOS if ratio)]


def grid(train: Units, valid: Units, heads: list[int], layers: list[int], settings: Mapping[str, Any]) -> np.ndarray:
    """AUC on `valid` by number of heads, number of layers and mix, with order and bounds from `train`."""
    ecs = _sums(train.ecs, valid, valid.ecs, heads[: settings["most"]])
    pks = _sums(train.pks, valid, valid.pks, layers[: settings["most"]])
    labels = valid.response_labels
    scores = ((n, k, i, m * pks[k] - alpha * ecs[n]) for n, k, (i, (m, alpha)) in _combinations(len(ecs), len(pks)))
    result = np.empty((len(ecs), len(pks), len(mixes())))
    for n, k, i, score in scores:
        result[n, k, i] = auc(labels, score)
    return result


def _combinations(heads: int, layers: int) -> Iterator[tuple[int, int, tuple[int, tuple[float, float]]]]:
    for n in range(heads):
        for k in range(layers):
            yield from ((n, k, mix) for mix in enumerate(mixes()))


def _sums(train: np.ndarray, valid: Units, values: np.ndarray, columns: list[int]) -> np.ndarray:
    """[number of columns - 1, R]: the mean scaled sum of the first columns over each response."""
    own, other = np.cumsum(train[:, columns], 1), np.cumsum(values[:, columns], 1)
    return np.stack([valid.average(scaled(other[:, i], bounds_of(own[:, i]))) for i in range(len(columns))])


def folds(units: Units, count: int, seed: int) -> list[np.ndarray]:
    """For each fold with both labels on both sides: bool [R], true for training. No source is on both sides."""
    names = sorted(set(units.sources))
    order = np.random.default_rng(seed).permutation(len(names))
    fold = {name: place % count for name, place in zip(names, order.tolist(), strict=True)}
    places = np.array([fold[source] for source in units.sources])
    labels = units.response_labels
    parts = [places != i for i in range(count)]
    return [part for part in parts if len(set(labels[part])) == len(set(labels[~part])) == 2]


def held_out(units: Units, settings: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """(score, called) of each response by a scorer that was fitted without its source; NaN, False where none was."""
    scores, called = np.full(len(units.sources), np.nan), np.zeros(len(units.sources), bool)
    for train in folds(units, settings["folds"], settings["seed"]):
        scorer = fit(units.take(train), settings)
        scores[~train] = scorer.judge(units.take(~train))
        called[~train] = scorer.calls(scores[~train])
    return scores, called


def measure(labels: np.ndarray, scores: np.ndarray, called: np.ndarray) -> Metrics:
    """AUC and PCC with their intervals; precision, recall and F1 of what is called."""
    require_both_labels(labels, "responses")
    return {
        "auc": auc(labels, scores),
        "pcc": correlation(labels, scores),
        **intervals(labels, scores),
        **at_threshold(labels, called),
    }
