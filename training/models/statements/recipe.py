"""Training of the statement embedder: statements of one paper are drawn together, in large batches of pairs.

Shapes: B statements of a batch, n pairs, T tokens, D width of the vectors.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from runtimes.errors import InputError
from runtimes.tensors import Tensors
from runtimes.text_pipeline import Tokens, padded
from training.config import Config
from training.models.statements.base import hidden_states, load_base, pool
from training.models.statements.contrastive import CachedContrast, cut
from training.models.statements.data import draw_pairs, split_by_paper, train_and_valid
from training.models.statements.embedding import Embedder
from training.models.statements.metrics import bm25, cosine, measure
from training.models.statements.module import adapted_layers
from training.models.statements.settings import INPUTS, PARITY_ROWS, TRAINED_ON
from training.models.statements.synthetic import flatten, synthetic_papers
from training.models.statements.tokenizer import tokenizer_json
from training.recipe import Evaluation, Recipe

CALIBRATION_ROWS = 512
Batch = dict[str, Tensor]


class StatementsRecipe(Recipe):
    """Papers are held out whole; a batch is of pairs, and its statements are negatives of each other."""

    @cached_property
    def papers(self) -> tuple[list[Any], list[Any]]:
        """Training and validation papers."""
        share, seed = self.training["valid_share"], self.training["seed"]
        if self.data is None:
            return split_by_paper(synthetic_papers(seed, self.training["papers"]), share, seed)
        return train_and_valid(self.data, share, seed)

    def summary(self) -> list[str]:
        lines = []
        for papers, purpose in zip(self.papers, ("to train on", "held out"), strict=True):
            statements, single = sum(len(p.statements) for p in papers), sum(len(p.statements) == 1 for p in papers)
            empty = sum(paper.empty for paper in papers)
            left_out = f"; {empty} without text left out" if empty else ""
            lines.append(
                f"{statements} statements of {len(papers)} papers {purpose}, {single} alone in theirs{left_out}"
            )
        return lines

    @cached_property
    def tokens(self) -> Tokens:
        config = self.config
        return Tokens(tokenizer_json(config["base"], config["base_revision"]), config["max_tokens"], keep="first")

    def datasets(self, step_rows: int) -> tuple["Pairs", "Pairs"]:
        train, valid = (self._pairs(papers, step_rows) for papers in self.papers)
        return train, valid

    def _pairs(self, papers: Sequence[Any], step_rows: int) -> "Pairs":
        texts, numbers = flatten(papers)
        return Pairs(self.tokens.rows(texts), numbers, self.tokens.pad, step_rows, self.training["seed"])

    def module_with_loss(self, module: nn.Module) -> nn.Module:
        if self.training["quantize"] not in ("none", "nf4"):
            raise InputError(f"expected quantize of none, nf4; found '{self.training['quantize']}'")
        for name in ("micro", "temperature"):
            if self.training[name] <= 0:
                raise InputError(f"expected {name} above 0, found {self.training[name]}")
        if self.training["quantize"] == "nf4":
            from training.models.statements.quantized import four_bit_twin

            module = four_bit_twin(module)
        return EmbedderWithLoss(module, self.training)

    def evaluate(self, module: nn.Module) -> Evaluation:
        """Each held-out statement is a query for the others of its paper; baselines: BM25 and the untrained base."""
        texts, papers = flatten(self.papers[1])
        vectors = torch.from_numpy(Embedder(module, self.tokens).embed(texts))
        with BaseAlone.of(module, self.config) as base:
            untrained = torch.from_numpy(Embedder(base, self.tokens).embed(texts))
        baselines = {"bm25": measure(papers, bm25(texts)), "untrained_base": measure(papers, cosine(untrained))}
        return Evaluation(metrics=measure(papers, cosine(vectors)), baselines=baselines)

    def sample_inputs(self) -> Tensors:
        """The first held-out statements and, under `TRAINED_ON`, some of all training papers; padded on the right."""
        (train, _), (valid, _) = map(flatten, self.papers)
        spread = np.linspace(0, len(train) - 1, min(CALIBRATION_ROWS, len(train))).astype(int)
        chosen = {"": valid[:PARITY_ROWS], TRAINED_ON: [train[i] for i in spread]}
        rows = {kind: padded(self.tokens.rows(texts), self.tokens.pad) for kind, texts in chosen.items()}
        return {kind + name: array for kind, pair in rows.items() for name, array in zip(INPUTS, pair, strict=True)}


class Pairs(Dataset[Batch]):
    """Pairs of statements of the same paper, drawn anew in every epoch; whole batches are made at once.

    Only full batches of `step_rows` pairs are in an epoch; which pairs are left over differs between epochs.
    """

    def __init__(self, rows: Sequence[np.ndarray], papers: np.ndarray, pad: int, step_rows: int, seed: int) -> None:
        self.rows, self.papers, self.pad, self.seed = rows, papers, pad, seed
        self.set_epoch(0)
        self.length = len(self.pairs) // step_rows * step_rows or len(self.pairs)

    def set_epoch(self, epoch: int) -> None:
        self.pairs = draw_pairs(self.papers, np.random.default_rng((self.seed, epoch)))

    def __len__(self) -> int:
        return self.length

    def __getitems__(self, places: Sequence[int]) -> Batch:
        """Tokens of the first statements of the pairs, then of the second; `labels` is each pair's paper."""
        pairs = self.pairs[list(places)]
        ids, mask = padded([self.rows[i] for i in pairs.T.ravel()], self.pad)
        arrays = {"input_ids": ids, "attention_mask": mask, "labels": self.papers[pairs[:, 0]]}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


class EmbedderWithLoss(nn.Module):
    """An embedder with the contrastive loss over the batches of all devices."""

    def __init__(self, embedder: nn.Module, training: Config) -> None:
        super().__init__()
        self.embedder = embedder
        self.micro, self.temperature = training["micro"], training["temperature"]
        self.register_state_dict_post_hook(_drop_base)
        self.register_load_state_dict_post_hook(_miss_no_base)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        trained = [parameter for parameter in self.embedder.parameters() if parameter.requires_grad]
        pieces = cut(input_ids, attention_mask, self.micro)
        return {"loss": CachedContrast.apply(self._embed, pieces, labels, self.temperature, *trained)}

    def _embed(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        vectors_BD: Tensor = self.embedder(ids_BT, mask_BT)[0]
        return vectors_BD

    def gradient_checkpointing_enable(self, **_: Any) -> None:
        """Called by the Trainer: the activations of a piece are recomputed layer by layer from now on."""
        # The reentrant form finds no gradient below a frozen embedding.
        options = {"use_reentrant": False}
        self.embedder.base.gradient_checkpointing_enable(options)  # type: ignore[union-attr, operator]


class BaseAlone(nn.Module):
    """A base without adapters and projection: its pooled states, normalised."""

    def __init__(self, base: Any, pooling: str) -> None:
        super().__init__()
        self.base, self.pooling = base, pooling

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        states_BTD = hidden_states(self.base, input_ids, attention_mask)
        return (F.normalize(pool(states_BTD, attention_mask, self.pooling).float(), dim=-1),)

    @classmethod
    @contextmanager
    def of(cls, module: Any, config: Config) -> Iterator["BaseAlone"]:
        """The base of `module` while its adapters are off; a new copy where they were merged into it."""
        layers = [layer for _, _, layer in adapted_layers(module)]
        base = module.base if layers else load_base(config["base"], config["base_revision"])
        try:
            for layer in layers:
                layer.enable_adapters(False)
            yield cls(base, config["pooling"])
        finally:
            for layer in layers:
                layer.enable_adapters(True)


def _drop_base(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """The Trainer's own states hold the trained parameters only; the base is read from its source."""
    for name in [name for name in state if name.startswith(f"{prefix}embedder.base.")]:
        del state[name]


def _miss_no_base(module: nn.Module, incompatible: Any) -> None:
    incompatible.missing_keys[:] = [
        name for name in incompatible.missing_keys if not name.startswith("embedder.base.") or ".lora_" in name
    ]
