"""Leaving out edges that were hardly attended to in the first epoch.

A discourse tree has one edge into each turn, whose attention therefore is 1: only edges to the dummy can be weak.
"""

import torch
from torch import Tensor

from training.models.strategy.module import StrategyGraph

Inputs = tuple[Tensor, ...]


class Pruning:
    """Which turns of each training sample are still heard by the dummy: those with attention of `threshold` or more.

    A sample is judged when it comes for the second time, by what was learned in the first epoch.
    """

    def __init__(self, graph: StrategyGraph, threshold: float, samples: int) -> None:
        self.graph, self.threshold = graph, threshold
        self.visits = torch.zeros(samples, dtype=torch.int64)
        self.silent: dict[int, Tensor] = {}

    def cut(self, typed_BNN: Tensor, rows_B: Tensor, inputs: Inputs) -> Tensor:
        """`typed_BNN` without the edges of these training samples that are cut."""
        rows = rows_B.tolist()
        if (self.visits[rows] == 1).any():
            with torch.no_grad():
                weak_BT = self.graph(*inputs)[2].mean(1) < self.threshold
            self.silent |= {row: weak for row, weak in zip(rows, weak_BT, strict=True) if row not in self.silent}
        self.visits[rows] += 1
        silent_BT = torch.stack([self.silent.get(row, torch.zeros_like(typed_BNN[0, 0, 1:]).bool()) for row in rows])
        result = typed_BNN.clone()
        result[:, 0, 1:] = result[:, 0, 1:].masked_fill(silent_BT.to(result.device), -1)
        return result

    @property
    def share(self) -> float:
        """How much of all places for edges to the dummy is cut so far."""
        return float(torch.stack(list(self.silent.values())).float().mean()) if self.silent else 0.0
