"""Relational graph attention across relations, additive, one head (Busbridge et al. 2019), in plain matrix products.

The form for export; `sparse` has the same on the same parameters, for training. Shapes: B batch, M nodes that receive,
N nodes that send, R relations, W width, K the form of the nodes: shares of a basis, or W itself.
"""

import torch
from torch import Tensor, nn

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

    def forward(
        self,
        receivers_BMK: Tensor,
        senders_BNK: Tensor,
        edges_BRMN: Tensor,
        relations: slice = slice(None),
        basis_KW: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The sums at the receivers and their attention [B, M, N] over all edges: 1 at [b, r, i, j] for j -> i.

        `relations` selects these R relations. With a basis, nodes are their shares of each vector in it.

        Vectors are summed before they are multiplied: each matrix is then read once, as a part of one product with
        a constant, and the scores need none. Export computes ahead all that depends on parameters only.
        """
        weight_RKW = self.weight[relations]
        if basis_KW is not None:
            weight_RKW = basis_KW @ weight_RKW
        asked_BMR = receivers_BMK @ (weight_RKW @ self.query).squeeze(-1).T
        told_BNR = senders_BNK @ (weight_RKW @ self.key).squeeze(-1).T
        scores_BRMN = asked_BMR.transpose(1, 2).unsqueeze(-1) + told_BNR.transpose(1, 2).unsqueeze(-2)
        # The softmax stays in float32, whatever the parameters are.
        scores_BRMN = nn.functional.leaky_relu(scores_BRMN.float(), SLOPE)
        scores_BRMN = torch.where(edges_BRMN > 0, scores_BRMN, UNREACHABLE)
        weights_BRMN = torch.exp(scores_BRMN - scores_BRMN.amax((1, 3), keepdim=True)) * edges_BRMN
        attention_BRMN = weights_BRMN / weights_BRMN.sum((1, 3), keepdim=True).clamp_min(SMALLEST_SUM)
        heard_BMRK = (attention_BRMN.to(senders_BNK.dtype) @ senders_BNK.unsqueeze(1)).transpose(1, 2)
        received_BMW = heard_BMRK.flatten(2) @ weight_RKW.flatten(0, 1)
        return received_BMW + self.bias, attention_BRMN.sum(1)
