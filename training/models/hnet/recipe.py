"""Training of an H-Net: prediction of the next byte and a target compression; each stage has its own learning rate.

Shapes: B pieces of a batch, T bytes, S stages.
"""

import time
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from runtimes.errors import InputError
from runtimes.tensors import Tensors
from training.config import Config, Metrics
from training.models.hnet.arch import check
from training.models.hnet.blocks import Isotropic
from training.models.hnet.data import (
    Batch,
    Corpus,
    Pieces,
    batch_of,
    check_compression,
    read_corpora,
    synthetic_corpora,
)
from training.models.hnet.losses import (
    alpha_at,
    decays,
    learning_rate_multipliers,
    ratio_loss,
    stage_of,
    stage_ratios,
)
from training.models.hnet.metrics import NATS_A_BIT, Tally, measure, next_byte_nats, positions
from training.models.hnet.ngram import KneserNey, unigram_bits
from training.models.hnet.settings import TIME_MAX
from training.recipe import Evaluation, Recipe

NGRAM = 5
SAMPLE_BYTES = 16_384
WORST_BITS = 8.0  # of a byte, from a model without information


# The experiments of a sweep share their text and its baselines.
@lru_cache(maxsize=1)
def _read(data: Path | None, unit: str, seed: int, texts: int) -> tuple[Corpus, Corpus, list[str]]:
    return (*synthetic_corpora(seed, texts), []) if data is None else read_corpora(data, unit)


@lru_cache(maxsize=1)
def _baseline_bits(data: Path | None, unit: str, seed: int, texts: int) -> dict[str, np.ndarray]:
    """The information of every held-out byte, by baseline."""
    train, valid, _ = _read(data, unit, seed, texts)
    return {"unigram": unigram_bits(train, valid), f"{NGRAM}gram": KneserNey.fit(train, NGRAM).bits(valid)}


class HNetRecipe(Recipe):
    """Pieces of documents; documents are held out whole."""

    @property
    def corpora(self) -> tuple[Corpus, Corpus]:
        """Training and validation text."""
        return self._read[:2]

    @property
    def _read(self) -> tuple[Corpus, Corpus, list[str]]:
        return _read(*self._source)

    @property
    def _source(self) -> tuple[Path | None, str, int, int]:
        return self.data, self.training["unit"], self.training["seed"], self.training["texts"]

    @cached_property
    def n_compress(self) -> list[int]:
        arch, _ = check(self.config)
        return check_compression(self.training["n_compress"], arch.stages)

    def summary(self) -> list[str]:
        return self._read[2]

    def module_with_loss(self, module: nn.Module) -> "HNetWithLoss":
        for name in ("alpha", "warmup_compression_epochs", "least_code_points"):
            if self.training[name] < 0:
                raise InputError(f"--set {name}: expected 0 or more, found {self.training[name]}")
        self._with_loss = HNetWithLoss(module, self.training, self.n_compress)
        return self._with_loss

    def datasets(self, step_rows: int) -> tuple[Pieces, Pieces]:
        train, valid = self.corpora
        common = {"step_rows": step_rows, "seed": self.training["seed"]}
        most = self.training["max_bytes"]
        return Pieces(train, most, **common, epoch_bytes=self.training["epoch_bytes"]), Pieces(valid, most, **common)

    def parameter_groups(self, module: nn.Module) -> list[dict[str, Any]]:
        """By stage, with its learning rate, and by whether weight decay is for it."""
        arch, widths = check(self.config)
        rates = (
            learning_rate_multipliers(self.n_compress, widths) if self.training["lr_by_stage"] else [1.0] * len(widths)
        )
        groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
        for name, parameter in module.named_parameters():
            groups.setdefault((stage_of(name, arch.stages), decays(name, parameter)), []).append(parameter)
        return [
            {
                "params": parameters,
                "lr": self.training["lr"] * rates[stage],
                "weight_decay": self.training["weight_decay"] if decayed else 0.0,
            }
            for (stage, decayed), parameters in groups.items()
        ]

    def report(self) -> Metrics:
        return self._with_loss.report()

    def selection_metric(self, module: nn.Module) -> Metrics:
        """Metrics on `selection_bytes` of the held-out text, spread over it."""
        pieces = self._spread(self.training["selection_bytes"])
        tally = measure(module, self.corpora[1], pieces, self.training["batch"])
        return {**tally.metrics(), "loss": self.criterion(tally)}

    def _spread(self, wanted_bytes: int) -> np.ndarray:
        """Pieces spread over the held-out text, about so many bytes; all of them if that is 0."""
        pieces = self.corpora[1].pieces(self.training["max_bytes"])
        wanted = wanted_bytes // self.training["max_bytes"] if wanted_bytes else len(pieces)
        places = np.linspace(0, len(pieces) - 1, max(1, min(wanted, len(pieces))))
        return pieces[np.unique(places.astype(int))]

    def criterion(self, tally: Tally) -> float:
        """Bits per byte, and more by WORST_BITS times the share by which segments fall short of `least_code_points`.

        Cross-entropy alone would select the checkpoint that compresses least.
        """
        length, least = tally.code_points_per_chunk, self.training["least_code_points"]
        short = max(0.0, 1 - length / least) if length is not None and least else 0.0
        return tally.metrics()["bits_per_byte"] + WORST_BITS * short

    def evaluate(self, module: nn.Module) -> Evaluation:
        """`evaluate_bytes` of held-out text, beside byte n-grams over whole documents."""
        pieces = self._spread(self.training["evaluate_bytes"])
        tally = measure(module, self.corpora[1], pieces, self.training["batch"])
        judged = np.concatenate([np.arange(begin, end) for begin, end in pieces])
        means = {name: float(bits[judged].mean()) for name, bits in _baseline_bits(*self._source).items()}
        baselines = {name: {"bits_per_byte": mean, "cross_entropy": mean * NATS_A_BIT} for name, mean in means.items()}
        return Evaluation(metrics={"criterion": self.criterion(tally), **tally.metrics()}, baselines=baselines)

    def sample_inputs(self) -> Tensors:
        """byte_ids uint8 [pieces, time] of held-out text, each beginning with BOS; all as long."""
        most = min(TIME_MAX, int(np.diff(self.corpora[1].offsets).max()))
        pieces = self.corpora[1].pieces(most)
        whole = pieces[np.argsort(pieces[:, 0] - pieces[:, 1], kind="stable")][: max(1, SAMPLE_BYTES // most)]
        whole[:, 1] = whole[:, 0] + (whole[:, 1] - whole[:, 0]).min()
        return {"byte_ids": batch_of(self.corpora[1], whole)["byte_ids"].numpy().astype(np.uint8)}


class HNetWithLoss(nn.Module):
    """An H-Net with its loss, and the metrics of its batches since the last report."""

    def __init__(self, hnet: nn.Module, training: Config, n_compress: list[int]) -> None:
        super().__init__()
        self.hnet, self.settings, self.ratios = hnet, training, stage_ratios(n_compress)
        self.since: float | None = None
        self._begin()

    def gradient_checkpointing_enable(self, **_: Any) -> None:
        """Called by the Trainer: the activations of a block are recomputed in the backward pass from now on."""
        for module in self.hnet.modules():
            if isinstance(module, Isotropic):
                module.checkpointing = True

    def forward(self, byte_ids: Tensor, labels: Tensor, lengths: Tensor, epoch: Tensor) -> dict[str, Tensor]:
        self.since = self.since or time.monotonic()  # the time between two epochs is not training
        logits, p_BTS, b_BTS = self.hnet(byte_ids, lengths)
        nats = next_byte_nats(logits, labels, "mean")
        alpha = alpha_at(int(epoch), self.settings["alpha"], self.settings["warmup_compression_epochs"])
        seen = positions(labels >= 0, b_BTS).sum((0, 1))
        loss = nats
        for ratio, chosen, likely in zip(
            self.ratios, (b_BTS.sum((0, 1)) / seen).unbind(), (p_BTS.sum((0, 1)) / seen).unbind(), strict=True
        ):
            loss = loss + alpha * ratio_loss(chosen, likely, ratio)
        with torch.no_grad():
            batch: Batch = {"byte_ids": byte_ids, "labels": labels}
            self.tally.add(batch, nats * (labels >= 0).sum(), p_BTS, b_BTS)
        return {"loss": loss}

    def report(self) -> Metrics:
        """Metrics of the training batches since the last report, and the bytes per second of training."""
        if self.since is None:
            return {}
        tally, seconds = self.tally, time.monotonic() - self.since
        self._begin()
        return {f"train_{name}": value for name, value in tally.metrics().items()} | {
            "bytes_per_s": tally.bytes / seconds
        }

    def _begin(self) -> None:
        self.tally = Tally(stages=len(self.ratios))
        self.since = None
