"""Relational graph attention across relations, additive, one head (Busbridge et al. 2019), in two equal forms.

Dense, in plain matrix products, for export; sparse, by PyG's RGATConv on the same parameters, for training.
Shapes: B batch, N nodes, R relations, W width, E edges.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from runtimes.errors import require

SLOPE = 0.2
UNREACHABLE = -1e4  # fits float16; its exponential is 0
SMALLEST_SUM = 1e-16  # clamped, not added: the exporter drops an addition this small


class RelationalAttention(nn.Module):
    """x_i becomes the sum of attention_ij * (x_j @ weight_r) over all edges j -> i of all relations r, plus a bias.

    A node without incoming edges becomes the bias.
    """

    def __init__(self, width: int, relations: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(relations, width, width))
        self.query = nn.Parameter(torch.empty(width, 1))
        self.key = nn.Parameter(torch.empty(width, 1))
        self.bias = nn.Parameter(torch.zeros(width))
        for matrix in (*self.weight, self.query, self.key):  # each relation by itself, as PyG does
            nn.init.xavier_uniform_(matrix)

    def forward(self, nodes_BNW: Tensor, edges_BRNN: Tensor) -> tuple[Tensor, Tensor]:
        """Nodes and attention [B, N, N] for edges that are 1 at [b, r, i, j] where j -> i has relation r, else 0."""
        sent_BRNW = nodes_BNW.unsqueeze(1) @ self.weight
        scores_BRNN = (sent_BRNW @ self.query) + (sent_BRNW @ self.key).transpose(-1, -2)
        # The softmax stays in float32, whatever the parameters are.
        scores_BRNN = nn.functional.leaky_relu(scores_BRNN.float(), SLOPE)
        scores_BRNN = torch.where(edges_BRNN > 0, scores_BRNN, UNREACHABLE)
        weights_BRNN = torch.exp(scores_BRNN - scores_BRNN.amax((1, 3), keepdim=True)) * edges_BRNN
        attention_BRNN = weights_BRNN / weights_BRNN.sum((1, 3), keepdim=True).clamp_min(SMALLEST_SUM)
        received_BNW = (attention_BRNN.to(sent_BRNW.dtype) @ sent_BRNW).sum(1)
        return received_BNW + self.bias, attention_BRNN.sum(1)


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


def _rgat_conv(layer: RelationalAttention) -> nn.Module:
    require("torch_geometric", extra="strategy")
    from torch_geometric.nn import RGATConv

    relations, width, _ = layer.weight.shape
    conv = RGATConv(width, width, relations, negative_slope=SLOPE)
    conv.weight, conv.q, conv.k, conv.bias = layer.weight, layer.query, layer.key, layer.bias
    # What RGATConv allocates for other modes than this one is not trained.
    for name in ("w", "l1", "b1", "l2", "b2"):
        getattr(conv, name).requires_grad_(False)
    return conv
