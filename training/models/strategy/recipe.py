"""Training of the strategy graph on outputs of the frozen parts, which run once.

Shapes: B batch, T turns, S strategies.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from runtimes.cache.store import Store
from runtimes.errors import InputError, require
from runtimes.pipelines.strategy.dialogue import EMOTIONS, STRATEGIES, graph_tensors
from runtimes.tensors import Tensors
from training.config import Config, Metrics
from training.frozen_store import FrozenInference
from training.models.strategy import reading
from training.models.strategy.data import Sample, split_by_dialogue, synthetic_samples, train_and_valid
from training.models.strategy.identities import tokens
from training.models.strategy.metrics import confusion, measure
from training.models.strategy.module import StrategyGraph, typed_edges
from training.models.strategy.pruning import Pruning
from training.recipe import Evaluation, Recipe

SAMPLE_ROWS = 16
EVERYTHING = 1 << 40  # entries that a store in memory may hold
INPUTS = ("context", "emotion_logits", "kinds", "strategies", "relations")
Batch = dict[str, Tensor]


class StrategyRecipe(Recipe):
    """Dialogues are held out whole; the frozen parts read each text once, now or in `training.precompute`."""

    @cached_property
    def samples(self) -> tuple[list[Sample], list[Sample]]:
        """Training and validation samples."""
        training, labels = self.training, self.config["labels"]
        if not 1 <= training["history"] <= self.config["max_turns"]:
            raise InputError(
                f"expected a history of 1 to max_turns = {self.config['max_turns']}, found {training['history']}"
            )
        if self.data is None:
            made = synthetic_samples(training["seed"], training["dialogues"], labels)
            return split_by_dialogue(made, training["valid_share"], training["seed"])
        return train_and_valid(self.data, labels, training["history"], training["valid_share"], training["seed"])

    def summary(self) -> list[str]:
        train, valid = self.samples
        groups = len({sample.group for sample in train}), len({sample.group for sample in valid})
        return [f"{len(train)} samples of {groups[0]} dialogues to train on, {len(valid)} of {groups[1]} held out"]

    def frozen_inferences(self) -> Sequence[FrozenInference]:
        train, valid = self.samples
        return reading.frozen_inferences(self.config, [sample.dialogue for sample in (*train, *valid)])

    @cached_property
    def tables(self) -> tuple[Batch, Batch]:
        """All training and all validation samples as tensors; with a store, no frozen part runs."""
        train, valid = self.samples
        dialogues = [sample.dialogue for sample in (*train, *valid)]
        folder = Path(self.training["store"]) if self.training["store"] else None
        with Store(folder, memory_entries=EVERYTHING) as store:
            known = reading.complete(self.config, dialogues, store, read=folder is None)
        return self._table(train, known), self._table(valid, known)

    def _table(self, samples: Sequence[Sample], known: reading.FrozenOutputs) -> Batch:
        longest = max(len(sample.dialogue.turns) for sample in (*self.samples[0], *self.samples[1]))
        dialogues = [known.complete(sample.dialogue) for sample in samples]
        emotions = np.zeros((len(samples), longest, len(EMOTIONS)), np.float32)
        for row, dialogue in zip(emotions, dialogues, strict=True):
            row[: len(dialogue.turns)] = dialogue.emotion_logits
        graph = graph_tensors(dialogues, len(STRATEGIES[self.config["labels"]]), longest)
        arrays = {"context": known.contexts(dialogues), "emotion_logits": emotions, **graph}
        labels = np.array([sample.label for sample in samples])
        return {name: torch.from_numpy(array) for name, array in {**arrays, "labels": labels}.items()}

    def module_with_loss(self, module: nn.Module) -> nn.Module:
        return GraphWithLoss(module.dialogue, self.training, self._class_weights(), len(self.samples[0]))  # type: ignore[arg-type]

    def _class_weights(self) -> Tensor:
        """Inverse frequencies to the power of `class_weights`, with mean 1; 0 gives all classes the same weight."""
        classes = len(STRATEGIES[self.config["labels"]])
        counts = torch.bincount(self.tables[0]["labels"], minlength=classes).clamp_min(1).float()
        weights = counts ** -float(self.training["class_weights"])
        return weights * classes / weights.sum()

    def datasets(self, step_rows: int) -> tuple[Dataset[Batch], Dataset[Batch]]:
        train, valid = self.tables
        return Shuffled(train, self.training["seed"]), Shuffled(valid, None)

    def evaluate(self, module: nn.Module) -> Evaluation:
        train, valid = self.tables
        with torch.inference_mode():
            logits = torch.cat([module.dialogue(*rows)[0] for rows in _pieces(valid)])  # type: ignore[operator]
        baselines = {
            "majority": self._measure(torch.full_like(valid["labels"], int(train["labels"].mode().values))),
            "text_only": self._measure(self._text_only(train, valid)),
        }
        return Evaluation(metrics=self._measure(logits.argmax(-1)), baselines=baselines)

    def _measure(self, predicted_B: Tensor) -> Metrics:
        labels = self.tables[1]["labels"].numpy()
        return measure(confusion(labels, predicted_B.numpy(), len(STRATEGIES[self.config["labels"]])))

    def _text_only(self, train: Batch, valid: Batch) -> Tensor:
        """The predictions of a logistic regression on the context vectors, with the same class weights.

        Training data of one class leave nothing to fit; that class is predicted.
        """
        if len(train["labels"].unique()) == 1:
            return train["labels"][:1].expand(len(valid["labels"]))
        linear = require("sklearn.linear_model", extra="strategy")
        pipeline = require("sklearn.pipeline", extra="strategy")
        preprocessing = require("sklearn.preprocessing", extra="strategy")
        weights = dict(enumerate(self._class_weights().tolist()))
        classifier = linear.LogisticRegression(class_weight=weights, max_iter=1000)
        model = pipeline.make_pipeline(preprocessing.StandardScaler(), classifier)
        model.fit(train["context"].numpy(), train["labels"].numpy())
        return torch.from_numpy(model.predict(valid["context"].numpy()))

    def sample_inputs(self) -> Tensors:
        """Held-out dialogues as the parts of the model take them, with the ids of their contexts and newest turns."""
        valid, samples = self.tables[1], self.samples[1]
        chosen = np.linspace(0, len(samples) - 1, min(SAMPLE_ROWS, len(samples))).astype(int)
        contexts, turns = tokens(self.config)
        rows = {name: valid[name].numpy()[chosen] for name in INPUTS}
        return {
            **rows,
            "context_ids": contexts.ids([samples[i].dialogue.context for i in chosen]),
            "newest_turn_ids": turns.ids([samples[i].dialogue.turns[-1].text for i in chosen]),
        }


class Shuffled(Dataset[Batch]):
    """Rows of a table, in another order every epoch if `seed` is given; whole batches are gathered at once."""

    def __init__(self, table: Batch, seed: int | None) -> None:
        self.table, self.seed = table, seed
        self.order = torch.arange(len(self))
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed * 10_007 + epoch)
            self.order = torch.randperm(len(self), generator=generator)

    def __len__(self) -> int:
        return len(self.table["labels"])

    def __getitems__(self, places: Sequence[int]) -> Batch:
        rows = self.order[torch.as_tensor(places)]
        return {**{name: tensor[rows] for name, tensor in self.table.items()}, "rows": rows}


class GraphWithLoss(nn.Module):
    """The graph part with its loss, its attention computed over a list of edges by PyG (`rgat=pyg`) or densely."""

    def __init__(self, graph: StrategyGraph, training: Config, class_weights: Tensor, samples: int) -> None:
        super().__init__()
        if training["rgat"] not in ("pyg", "dense"):
            raise InputError(f"expected rgat of pyg, dense; found '{training['rgat']}'")
        if training["prune"] and training["rgat"] != "pyg":
            raise InputError("expected rgat of pyg to prune edges, found dense, where all edges cost the same")
        self.graph = graph
        self.pruning = Pruning(graph, training["prune"], samples) if training["prune"] else None
        # In a list, and so not registered: their parameters are those of `graph`, which are saved once.
        self.sparse = [sparse_layers(graph)] if training["rgat"] == "pyg" else []
        self.register_buffer("class_weights", class_weights, persistent=False)

    def forward(self, labels: Tensor, rows: Tensor, **inputs: Tensor) -> dict[str, Tensor]:
        if self.sparse:
            nodes = self.graph.nodes(inputs["emotion_logits"], inputs["kinds"], inputs["strategies"])
            typed = typed_edges(inputs["kinds"], inputs["relations"])
            if self.training and self.pruning:
                typed = self.pruning.cut(typed, rows, tuple(inputs[name] for name in INPUTS))
            nodes = self.sparse[0](nodes, typed)
            logits = self.graph.classify(nodes[:, 0], inputs["context"])
        else:
            logits = self.graph(*(inputs[name] for name in INPUTS))[0]
        return {"loss": F.cross_entropy(logits, labels, self.class_weights)}  # type: ignore[arg-type]


def sparse_layers(graph: StrategyGraph) -> nn.Module:
    """The layers of `graph` over a list of edges; PyG is needed for training alone."""
    require("torch_geometric", extra="strategy")
    from training.models.strategy.sparse import SparseLayers

    return SparseLayers(list(graph.layers))  # type: ignore[arg-type]


def _pieces(table: Batch, size: int = 256) -> Any:
    for start in range(0, len(table["labels"]), size):
        yield tuple(table[name][start : start + size] for name in INPUTS)
