"""How well an H-Net predicts, and how it divides: bits per byte, and how long its segments are.

Shapes: B pieces of a batch, T bytes, S stages.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.config import Metrics
from training.models.hnet.data import IGNORED, Batch, Corpus, batch_of
from training.models.hnet.module import is_continuation

NATS_A_BIT = float(np.log(2))


@dataclass(kw_only=True)
class Tally:
    """Sums over bytes, from which every number follows. A stage sees only what begins a chunk in the one around it."""

    stages: int
    bytes: int = 0
    code_points: int = 0
    nats: float = 0.0
    inside: int = 0  # boundaries of the outermost stage at continuation bytes
    seen: Tensor = field(init=False)
    begun: Tensor = field(init=False)
    likely: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.seen, self.begun, self.likely = (torch.zeros(self.stages, dtype=torch.float64) for _ in range(3))

    def add(self, batch: Batch, nats: Tensor, p_BTS: Tensor, b_BTS: Tensor) -> None:
        """Count a batch whose bytes cost `nats` in all."""
        real_BT = batch["labels"] != IGNORED
        continued_BT = is_continuation(batch["byte_ids"])
        self.bytes += int(real_BT.sum())
        self.code_points += int((real_BT & ~continued_BT).sum())
        self.nats += float(nats)
        if self.stages:
            self.inside += int((b_BTS[..., 0] & continued_BT).sum())
            self.begun += b_BTS.sum((0, 1)).double().cpu()
            self.likely += p_BTS.detach().double().sum((0, 1)).cpu()
            self.seen += positions(real_BT, b_BTS).sum((0, 1)).double().cpu()

    def metrics(self) -> Metrics:
        """Cross-entropy in nats, bits per byte, and how the text is divided.

        Of every stage the share of its positions that begin a chunk (F), their mean probability (G), and bytes and code
        points a chunk; of the first the share of boundaries that lie inside a code point.
        """
        result = {
            "cross_entropy": self.nats / self.bytes,
            "bits_per_byte": self.nats / self.bytes / NATS_A_BIT,
        }
        for s, begun in enumerate(self.begun.tolist()):
            stage = f"stage{s}_" if self.stages > 1 else ""
            result[f"{stage}F"] = begun / float(self.seen[s])
            result[f"{stage}G"] = float(self.likely[s] / self.seen[s])
            result[f"{stage}bytes_per_chunk"] = self.bytes / begun
            result[f"{stage}code_points_per_chunk"] = self.code_points / begun
        if self.stages:
            result["inside_code_point"] = self.inside / float(self.begun[0])
        return result

    @property
    def code_points_per_chunk(self) -> float | None:
        """Of the innermost stage; None where nothing is divided."""
        return self.code_points / float(self.begun[-1]) if self.stages else None


def positions(real_BT: Tensor, b_BTS: Tensor) -> Tensor:
    """bool [B, T, S]: the positions that each stage sees."""
    return torch.cat([real_BT[..., None], b_BTS[..., :-1]], -1)


def next_byte_nats(logits_BTV: Tensor, labels_BT: Tensor, reduction: str = "sum") -> Tensor:
    """Cross-entropy in nats of the bytes that follow, in float32."""
    return F.cross_entropy(
        logits_BTV.float().flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORED, reduction=reduction
    )


def measure(module: nn.Module, corpus: Corpus, pieces: np.ndarray, rows: int) -> Tally:
    """The tally of `module` over these pieces of a corpus, `rows` at a time; its mode is left as it was."""
    was_training, device = module.training, next(module.parameters()).device
    module.eval()
    tally = Tally(stages=module.backbone.stages)  # type: ignore[union-attr, arg-type]
    with torch.inference_mode():
        for batch in batches(corpus, pieces, rows):
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            logits, p_BTS, b_BTS = module(batch["byte_ids"], batch["lengths"])
            tally.add(batch, next_byte_nats(logits, batch["labels"]), p_BTS, b_BTS)
    module.train(was_training)
    return tally


def batches(corpus: Corpus, pieces: np.ndarray, rows: int) -> Iterable[Batch]:
    """The pieces in batches of like length, the longest first."""
    order = np.argsort(pieces[:, 0] - pieces[:, 1], kind="stable")
    return (batch_of(corpus, pieces[order[start : start + rows]]) for start in range(0, len(order), rows))
