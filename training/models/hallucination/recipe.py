"""Fit and evaluation of the scorer, on answers with held-out sources; one baseline is the length of their chunks."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from runtimes.cache.store import Store
from runtimes.errors import InputError
from runtimes.pipelines.hallucination.grounding import TooLong
from runtimes.tensors import Tensors
from training.config import Config, Metrics
from training.frozen_store import FrozenInference, fill
from training.models.hallucination import fitting
from training.models.hallucination.data import (
    Example,
    held_out_sources,
    read_ragtruth,
    synthetic_examples,
    train_and_valid,
)
from training.models.hallucination.metrics import auc, best_threshold
from training.models.hallucination.module import Scorer, ScorerAlone, build_detector
from training.models.hallucination.reading import FeatureReader
from training.models.hallucination.settings import head_text, heads_of, layer_text, layers_of
from training.models.hallucination.units import Units, joined, read_log, require_both_labels, synthetic_units
from training.recipe import Evaluation, Recipe

SAMPLE_ROWS = 16
MOST_MAGNIFIED = 100.0  # a larger factor makes a rounding of 1e-7 comparable with the tolerance of a score
LEAST = {"top_n": 1, "top_k": 1, "folds": 2, "most": 1, "ensemble": 1, "responses": 1}
EVERYTHING = 1 << 40  # entries that a store in memory may hold


class ScorerRecipe(Recipe):
    """From a score log, or from synthetic features: no model runs."""

    def __init__(self, config: Config, training: Config, data: Path | None) -> None:
        for name, least in LEAST.items():
            if training[name] < least:
                raise InputError(f"--set {name}: expected {least} or more, found {training[name]}")
        super().__init__(config, training, data)

    @cached_property
    def units(self) -> tuple[Units, Units]:
        """Units to fit to and units to evaluate on, with different sources."""
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
        return ScorerAlone(config)

    def fit(self) -> nn.Module:
        """The module with the best scorer; the config then names its heads, layers and threshold."""
        fitted = fitting.fit(self.units[0], self.training)
        if fitted.magnification > MOST_MAGNIFIED:
            print(
                f"warning: the features hardly differ between chunks, and scores magnify their rounding "
                f"{fitted.magnification:.0f} times, so that parity may fail; use models whose vectors of "
                f"different texts differ",
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
        load_fitted(module.scorer, fitted)
        return module

    def evaluate(self, module: nn.Module) -> Evaluation:
        train, valid = self.units
        scorer = fitted_of(module.scorer, self.config["threshold"])  # type: ignore[arg-type]
        baselines = {
            "published_settings": metrics_of(fitting.fit_published(train, self.training), valid),
            **length_baselines(train, valid, self.training),
        }
        return Evaluation(metrics=metrics_of(scorer, valid), baselines=baselines)

    def evaluate_settings(self) -> Evaluation:
        """The published protocol, which selects and evaluates on the same answers; and the same answers held out."""
        every = self.logged() if self.training["scores"] else self.every_unit()
        published = metrics_of(fitting.fit_published(every, self.training), every)
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
    """From RAGTruth or synthetic answers, whose features are read once; or from a score log of the base."""

    def __init__(self, config: Config, training: Config, data: Path | None) -> None:
        # A fitted config names the selected heads and layers; `read_*` names those they were selected from.
        read = {name: training[f"read_{name}"] or config[name] for name in ("heads", "layers")}
        known = {f"read_{name}": text for name, text in read.items()}
        super().__init__(config, {**training, **known}, data)
        self.reader = FeatureReader({**config, **read}, self.training)

    @cached_property
    def examples(self) -> tuple[list[Example], list[Example]]:
        """Answers to fit to and answers to evaluate on, but for those in `left_out`."""
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
        """The answers that are too long, each with the reason."""
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
        # Answers and not units, which exist only after the frozen models have run.
        lines = [
            f"{len(part)} answers {what}, {sum(bool(example.hallucinated) for example in part)} of them hallucinated"
            for part, what in zip(self.examples, ("to fit to", "held out"), strict=True)
        ]
        return [*lines, self._why()] if self.left_out else lines

    def frozen_inferences(self) -> Sequence[FrozenInference]:
        train, valid = self.examples
        return [self.reader.inference([*train, *valid])]

    @cached_property
    def units(self) -> tuple[Units, Units]:
        if self.training["scores"]:
            heads, layers = heads_of(self.reader.config), layers_of(self.reader.config)
            to_fit, held_out = (units.columns(heads, layers) for units in self.logged_units())
            return to_fit, held_out
        train, valid = self.examples
        folder = Path(self.training["store"]) if self.training["store"] else None
        with Store(folder, memory_entries=EVERYTHING) as store:
            (inference,) = self.frozen_inferences()
            fill(store, inference, self.training["padded_size"])
            entries = store.namespace(inference.namespace, inference.identity).require(
                inference.texts, "read them again"
            )
        cut = len(train)
        return self.reader.units(train, entries[:cut]), self.reader.units(valid, entries[cut:])

    def every_unit(self) -> Units:
        train, valid = self.units
        return joined(train, valid)

    def build(self, config: Config) -> Any:
        return build_detector(config)

    def sample_inputs(self) -> Tensors:
        examples = self.examples[1] if not self.training["scores"] else synthetic_examples(0, SAMPLE_ROWS)
        texts = [self.reader.read(example.text) for example in examples[:SAMPLE_ROWS]]
        return self.reader.pipeline.tensors(texts)


def metrics_of(scorer: fitting.Scorer, units: Units) -> Metrics:
    """Metrics of the scorer on these answers and chunks."""
    scores = scorer.judge(units)
    found = fitting.measure(units.response_labels, scores, scorer.calls(scores))
    return {**found, "chunk_auc": auc(units.labels, scorer.score(units)), "threshold": scorer.threshold}


def length_baselines(train: Units, valid: Units, settings: Config) -> dict[str, Metrics]:
    """Chunk length alone, and in place of PKS in the published score: baselines without the content of the answer."""
    require_both_labels(valid.response_labels, "responses")
    threshold = best_threshold(train.response_labels, train.average(train.lengths))
    scores = valid.average(valid.lengths)
    alone = fitting.measure(valid.response_labels, scores, scores >= threshold)
    scorer = fitting.fit_published(length_for_pks(train), settings)
    return {
        "chunk_length": {**alone, "chunk_auc": auc(valid.labels, valid.lengths), "threshold": threshold},
        "length_for_pks": metrics_of(scorer, length_for_pks(valid)),
    }


def length_for_pks(units: Units) -> Units:
    """The units with their number of tokens as the only layer's PKS."""
    return replace(units, layers=(0,), pks=units.lengths[:, None].astype(np.float64))


def load_fitted(scorer: Scorer, fitted: fitting.Scorer) -> None:
    """Set the buffers of the module to the fitted scorer; its heads and layers must be those of the module's config."""
    for i, member in enumerate(fitted.members):
        scorer.uses_head[i] = torch.tensor([float(head in member.heads) for head in scorer.heads])
        scorer.uses_layer[i] = torch.tensor([float(layer in member.layers) for layer in scorer.layers])
        scorer.mix[i] = torch.tensor([member.m, member.alpha])
        scorer.ecs_bounds[i] = torch.tensor(member.ecs_bounds)
        scorer.pks_bounds[i] = torch.tensor(member.pks_bounds)
    scorer.bounds[:] = torch.tensor(fitted.bounds)


def fitted_of(scorer: Scorer, threshold: float) -> fitting.Scorer:
    """The scorer of the module in float64, to evaluate whole tables of features."""
    members = tuple(
        fitting.Member(
            heads=tuple(head for head, used in zip(scorer.heads, scorer.uses_head[i], strict=True) if used),
            layers=tuple(layer for layer, used in zip(scorer.layers, scorer.uses_layer[i], strict=True) if used),
            m=float(scorer.mix[i, 0]),
            alpha=float(scorer.mix[i, 1]),
            ecs_bounds=(float(scorer.ecs_bounds[i, 0]), float(scorer.ecs_bounds[i, 1])),
            pks_bounds=(float(scorer.pks_bounds[i, 0]), float(scorer.pks_bounds[i, 1])),
        )
        for i in range(len(scorer.mix))
    )
    bounds = float(scorer.bounds[0]), float(scorer.bounds[1])
    return fitting.Scorer(members=members, bounds=bounds, threshold=threshold)
