"""The relational attention over a list of edges, for training: PyG's RGATConv on the parameters of the dense layers.

Shapes: B batch, N nodes, R relations, W width, E edges.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.nn import RGATConv
from torch_geometric.utils import softmax

from training.models.strategy.rgat import SLOPE, RelationalAttention


class SparseLayers(nn.Module):
    """The same layers by RGATConv, over a list of edges; their parameters are those of the dense layers."""

    def __init__(self, layers: Sequence[RelationalAttention]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_rgat_conv(layer) for layer in layers)

    def forward(self, nodes_BNW: Tensor, relations_BNN: Tensor) -> Tensor:
        """Nodes after all layers; `relations_BNN` holds at [i, j] the relation of j -> i, or -1."""
        batch, nodes, width = nodes_BNW.shape
        row_E, tail_E, head_E = (relations_BNN >= 0).nonzero(as_tuple=True)
        edges_2E = torch.stack([row_E * nodes + head_E, row_E * nodes + tail_E])
        kinds_E = relations_BNN[row_E, tail_E, head_E]
        flat = nodes_BNW.reshape(batch * nodes, width)
        for layer in self.layers:
            flat = layer(flat, edges_2E, kinds_E) + flat
        return flat.view(batch, nodes, width)


class GroupedRGATConv(RGATConv):
    """RGATConv as it is by default, but each relation's matrix multiplies all of its edges at once.

    RGATConv (PyG 2.8) copies one matrix for every edge: 1 MB each at width 512, and as much again for its gradient.
    """

    def message(
        self, x_i: Tensor, x_j: Tensor, edge_type: Tensor, edge_attr: Any, index: Tensor, ptr: Any, size_i: Any
    ) -> Tensor:
        sent_EW = self.project(x_j, edge_type)
        scores_E1 = self.project(x_i, edge_type) @ self.q + sent_EW @ self.k
        scores_E1 = nn.functional.leaky_relu(scores_E1, self.negative_slope)
        self._alpha = softmax(scores_E1, index, ptr, size_i)
        return self._alpha * sent_EW

    def project(self, x_EW: Tensor, kinds_E: Tensor) -> Tensor:
        """Each row times the matrix of its relation."""
        order_E = kinds_E.argsort()
        counts_R = torch.bincount(kinds_E, minlength=self.num_relations).tolist()
        groups = zip(x_EW[order_E].split(counts_R), self.weight.unbind(), strict=True)
        sorted_EW = torch.cat([rows @ matrix for rows, matrix in groups])
        return torch.empty_like(sorted_EW).index_copy(0, order_E, sorted_EW)


def _rgat_conv(layer: RelationalAttention) -> GroupedRGATConv:
    relations, width, _ = layer.weight.shape
    conv = GroupedRGATConv(width, width, relations, negative_slope=SLOPE)
    conv.weight, conv.q, conv.k, conv.bias = layer.weight, layer.query, layer.key, layer.bias
    # Parameters of RGATConv for other modes are not trained.
    for name in ("w", "l1", "b1", "l2", "b2"):
        getattr(conv, name).requires_grad_(False)
    return conv
