"""How the scorer is fitted, and judged: on answers whose sources it has not seen, beside the length of their chunks."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from runtimes.cache.store import Store
from runtimes.errors import InputError
from runtimes.pipelines.hallucination.grounding import TooLong
from runtimes.tensors import Tensors
from training.models.hallucination import fitting
from training.models.hallucination.config import LEAST_TRAINING, head_text, heads_of, layer_text, layers_of
from training.models.hallucination.data import (
    Example,
    held_out_sources,
    read_ragtruth,
    synthetic_examples,
    train_and_valid,
)
from training.models.hallucination.metrics import auc, best_threshold
from training.models.hallucination.reading import FeatureReader
from training.models.hallucination.spec import build, build_scorer
from training.models.hallucination.units import Units, read_log, require_both_labels
from training.precompute import fill
from training.spec import Config, Evaluation, FrozenInference, Metrics, Recipe

SAMPLE_ROWS = 16
MOST_MAGNIFIED = 100.0  # a rounding of 1e-7 that a score makes larger than this is no longer small beside its tolerance
EVERYTHING = 1 << 40  # entries that a store in memory may hold


class ScorerRecipe(Recipe):
    """From a score log, or from made-up features: no model is read."""

    def __init__(self, config: Config, training: Config, data: Path | None) -> None:
        for name, least in LEAST_TRAINING.items():
            if training[name] < least:
                raise InputError(f"--set {name}: expected {least} or more, found {training[name]}")
        super().__init__(config, training, data)

    @cached_property
    def units(self) -> tuple[Units, Units]:
        """Units to fit to and units to judge by, apart by source."""
        return self.logged_units()

    def logged_units(self) -> tuple[Units, Units]:
        every = self.logged()
        held = held_out_sources(every.sources, self.training["valid_share"], self.training["seed"])
        valid = np.array([source in held for source in every.sources])
        return every.take(~valid), every.take(valid)

    def logged(self) -> Units:
        if self.training["scores"]:
            return read_log(Path(self.training["scores"]))
        return synthetic_units(self.config, self.training["seed"], self.training["responses"])

    def build(self, config: Config) -> Any:
        return build_scorer(config)

    def fit(self) -> nn.Module:
        """The module with the scorer that does best; the config then names its heads, layers and threshold."""
        fitted = fitting.fit(self.units[0], self.training)
        if fitted.magnification > MOST_MAGNIFIED:
            print(
                f"warning: the features hardly differ from chunk to chunk, and scores magnify their rounding "
                f"{fitted.magnification:.0f} times: a conversion may not keep that. Take models that tell texts apart",
                file=sys.stderr,
            )
        self.config = {
            **self.config,
            "heads": head_text(fitted.heads),
            "layers": layer_text(fitted.layers),
            "members": len(fitted.members),
            "threshold": fitted.threshold,
        }
        module = self.build(self.config).eval()
        module.scorer.take(fitted)
        return module

    def evaluate(self, module: nn.Module) -> Evaluation:
        train, valid = self.units
        scorer = module.scorer.fitted(self.config["threshold"])  # type: ignore[operator,union-attr]
        baselines = {
            "published_settings": judged(fitting.fit_published(train, self.training), valid),
            **length_baselines(train, valid, self.training),
        }
        return Evaluation(metrics=judged(scorer, valid), baselines=baselines)

    def evaluate_settings(self) -> Evaluation:
        """The published protocol, which chooses and judges on the same answers; beside it the same answers held out."""
        every = self.logged() if self.training["scores"] else self.every_unit()
        published = judged(fitting.fit_published(every, self.training), every)
        scores, called = fitting.held_out(every, self.training)
        known = np.isfinite(scores)
        held_out = fitting.measure(every.response_labels[known], scores[known], called[known])
        return Evaluation(
            metrics=published,
            baselines={"held_out": held_out, **length_baselines(every, every, self.training)},
        )

    def every_unit(self) -> Units:
        raise InputError("expected --scores FILE or --checkpoint DIR, found neither")

    def sample_inputs(self) -> Tensors:
        valid = self.units[1].columns(heads_of(self.config), layers_of(self.config))
        return {"ecs": valid.ecs.astype(np.float32), "pks": valid.pks.astype(np.float32), "lengths": valid.lengths}

    def summary(self) -> list[str]:
        train, valid = self.units
        return [
            f"{len(part.labels)} chunks of {len(part.sources)} answers {what}, "
            f"{int(part.response_labels.sum())} of the answers hallucinated"
            for part, what in ((train, "to fit to"), (valid, "held out"))
        ]


class HallucinationRecipe(ScorerRecipe):
    """From RAGTruth or made-up answers, whose features the frozen models read once; or from a score log of the base."""

    def __init__(self, config: Config, training: Config, data: Path | None) -> None:
        # A fitted config names the heads and layers that were chosen; they were chosen from these.
        read = {name: training[f"read_{name}"] or config[name] for name in ("heads", "layers")}
        known = {f"read_{name}": text for name, text in read.items()}
        super().__init__(config, {**training, **known}, data)
        self.reader = FeatureReader({**config, **read}, self.training)

    @cached_property
    def examples(self) -> tuple[list[Example], list[Example]]:
        """Answers to fit to and answers to judge by, but for those in `left_out`."""
        seed, share = self.training["seed"], self.training["valid_share"]
        if self.data is None:
            return train_and_valid(synthetic_examples(seed, self.training["responses"]), share, seed)
        read = [example for example in self._answers if example.text not in self.left_out]
        if not read:
            raise InputError(f"{self.data}: expected answers that are short enough, found none; {self._why()}")
        return train_and_valid(read, share, seed)

    @cached_property
    def _answers(self) -> list[Example]:
        return [] if self.data is None else read_ragtruth(self.data, self.training["generator"])

    @cached_property
    def left_out(self) -> dict[str, str]:
        """The answers with more tokens than are read, each with the reason."""
        result = {}
        for example in self._answers:
            try:
                self.reader.read(example.text, f"answer to source {example.source}")
            except TooLong as error:
                result[example.text] = str(error)
        return result

    def _why(self) -> str:
        return f"{len(self.left_out)} left out, the first: {next(iter(self.left_out.values()))}"

    def summary(self) -> list[str]:
        if self.training["scores"]:
            return super().summary()
        # Of the answers alone: their units are there once the frozen models have read them.
        told = [
            f"{len(part)} answers {what}, {sum(bool(example.hallucinated) for example in part)} of them hallucinated"
            for part, what in zip(self.examples, ("to fit to", "held out"), strict=True)
        ]
        return [*told, self._why()] if self.left_out else told

    def frozen_inferences(self) -> Sequence[FrozenInference]:
        train, valid = self.examples
        return [self.reader.reading([*train, *valid])]

    @cached_property
    def units(self) -> tuple[Units, Units]:
        if self.training["scores"]:
            heads, layers = heads_of(self.reader.config), layers_of(self.reader.config)
            fitted, judged = (units.columns(heads, layers) for units in self.logged_units())
            return fitted, judged
        train, valid = self.examples
        folder = Path(self.training["store"]) if self.training["store"] else None
        with Store(folder, memory_entries=EVERYTHING) as store:
            (reading,) = self.frozen_inferences()
            fill(store, reading, self.training["padded_size"])
            entries = store.namespace(reading.namespace, reading.identity).require(reading.texts, "read them again")
        cut = len(train)
        return self.reader.units(train, entries[:cut]), self.reader.units(valid, entries[cut:])

    def every_unit(self) -> Units:
        train, valid = self.units
        return joined(train, valid)

    def build(self, config: Config) -> Any:
        return build(config)

    def sample_inputs(self) -> Tensors:
        examples = self.examples[1] if not self.training["scores"] else synthetic_examples(0, SAMPLE_ROWS)
        texts = [self.reader.read(example.text) for example in examples[:SAMPLE_ROWS]]
        return self.reader.pipeline.tensors(texts)


def judged(scorer: fitting.Scorer, units: Units) -> Metrics:
    """How well the scorer tells hallucinated answers, and chunks, from faithful ones."""
    scores = scorer.judge(units)
    found = fitting.measure(units.response_labels, scores, scorer.calls(scores))
    return {**found, "chunk_auc": auc(units.labels, scorer.score(units)), "threshold": scorer.threshold}


def length_baselines(train: Units, valid: Units, settings: Config) -> dict[str, Metrics]:
    """Chunk length alone, and in place of PKS in the published score: what knows nothing of what was said."""
    require_both_labels(valid.response_labels, "responses")
    threshold = best_threshold(train.response_labels, train.average(train.lengths))
    scores = valid.average(valid.lengths)
    alone = fitting.measure(valid.response_labels, scores, scores >= threshold)
    scorer = fitting.fit_published(length_for_pks(train), settings)
    return {
        "chunk_length": {**alone, "chunk_auc": auc(valid.labels, valid.lengths), "threshold": threshold},
        "length_for_pks": judged(scorer, length_for_pks(valid)),
    }


def length_for_pks(units: Units) -> Units:
    """The units with their number of tokens as the only layer's PKS."""
    return replace(units, layers=(0,), pks=units.lengths[:, None].astype(np.float64))


def joined(one: Units, other: Units) -> Units:
    """The units of both; responses and sources of the other are numbered after those of the one."""
    names = ("ecs", "pks", "labels", "lengths", "weights")
    arrays: dict[str, Any] = {name: np.concatenate([getattr(one, name), getattr(other, name)]) for name in names}
    responses = np.concatenate([one.responses, other.responses + len(one.sources)])
    return replace(one, **arrays, responses=responses, sources=one.sources + other.sources)


def synthetic_units(config: Config, seed: int, count: int) -> Units:
    """Made-up features: heads and layers that tell more and less, and chunks that are longer where hallucinated."""
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
