"""Pruning of edges with little attention in the first epoch.

A discourse tree has one edge into each turn, whose attention therefore is 1: only edges to the dummy can be weak.
"""

import torch
from torch import Tensor

from training.models.strategy.module import StrategyGraph

Inputs = tuple[Tensor, ...]


class Pruning:
    """The turns of each training sample whose edge to the dummy has an attention of `threshold` or more.

    A sample's edges are selected at its second visit, by the weights after the first epoch.
    """

    def __init__(self, graph: StrategyGraph, threshold: float, samples: int) -> None:
        self.graph, self.threshold = graph, threshold
        self.visits = torch.zeros(samples, dtype=torch.int64)
        self.silent: dict[int, Tensor] = {}

    def cut(self, typed_BNN: Tensor, rows_B: Tensor, inputs: Inputs) -> Tensor:
        """`typed_BNN` without the pruned edges of these training samples."""
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
        """The share of the edges to the dummy that is removed so far, padding included."""
        return float(torch.stack(list(self.silent.values())).float().mean()) if self.silent else 0.0
