"""The detector: frozen decoder and sentence encoder, the features that the scorer reads, the scorer.

Shapes: B batch, T tokens, R rows, C chunks of the answer, S chunks of the prompt, H heads, L layers, M members of the
scorer.
"""

from collections.abc import Mapping
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from training.models.hallucination.decoder import Decoder, View
from training.models.hallucination.features import (
    best_chunk,
    chunk_attention,
    in_blocks,
    knowledge,
    pooled,
    resemblance,
    top_share,
    within,
)
from training.models.hallucination.frozen import SentenceEncoder
from training.models.hallucination.settings import heads_of, layers_of

Features = tuple[Tensor, Tensor, Tensor]  # ECS [B, C, H], PKS [B, C, L], gap [B, C, H] to the next choice of a head


class Detector(nn.Module):
    """The common parts of both levels. `base` is frozen, `scorer` is trained."""

    def __init__(self, config: Mapping[str, Any], base: Decoder | None = None) -> None:
        super().__init__()
        self.base = base or Decoder(config["base"], config["base_revision"])
        self.scorer = Scorer(config)
        self.chosen = {
            layer: [head for _, head in group] for layer, group in groupby(heads_of(config), lambda head: head[0])
        }
        self.lens_layers = layers_of(config)
        self.jsd: str = config["jsd"]
        self.mean = config["chunk_sum"] == "mean"
        self.percent: int = config["top_percent"]
        self.most: int = config["max_tokens"]

    def lens(self, view: View, rows_BR: Tensor, by_chunk: bool) -> list[Tensor]:
        """[PKS [B, R]] of a layer that the scorer reads, or nothing."""
        read = view.number in self.lens_layers
        return [knowledge(self.base, view, rows_BR, self.jsd, by_chunk)] if read else []

    def score(self, features: Features, row_spans: Tensor, characters: Tensor) -> tuple[Tensor, ...]:
        """(ECS, PKS, scores [B, C], response scores [B], gaps, spans [B, C, 2]), all 0 for a padded chunk."""
        ecs, pks, gap = features
        lengths_BC = row_spans[..., 1] - row_spans[..., 0]
        scores_BC, response_B = self.scorer(ecs, pks, lengths_BC)
        real_BC1 = (lengths_BC > 0).unsqueeze(-1)
        ecs, pks = (torch.where(real_BC1, values, 0.0) for values in (ecs, pks))
        gap = torch.where(real_BC1, gap, 1.0)
        return ecs, pks, scores_BC, response_B, gap, torch.where(real_BC1, characters, 0)


class TokenDetector(Detector):
    """By token: a head's choice is the top share of tokens; the features of a chunk are the mean of its tokens."""

    def forward(
        self, token_ids: Tensor, rows: Tensor, prompt_range: Tensor, row_spans: Tensor, characters: Tensor
    ) -> tuple[Tensor, ...]:
        return self.score(self.features(token_ids, rows, prompt_range, row_spans), row_spans, characters)

    def features(self, token_ids: Tensor, rows: Tensor, prompt_range: Tensor, row_spans: Tensor) -> Features:
        inside_BCR = within(row_spans, rows.shape[1])
        ecs_BRH, pks_BRL, gap_BRH = self.by_token(token_ids, rows, prompt_range)
        apart_BCRH = torch.where(inside_BCR.unsqueeze(-1) > 0, gap_BRH.unsqueeze(1), 1.0)
        return pooled(ecs_BRH, inside_BCR, True), pooled(pks_BRL, inside_BCR, self.mean), apart_BCRH.amin(2)

    def by_token(self, token_ids: Tensor, rows: Tensor, prompt_range: Tensor) -> Features:
        """(ECS [B, R, H], PKS [B, R, L], gap [B, R, H])."""
        pks, chosen, gaps = [], [], []
        for view in self.base.layers(token_ids, len(self.base.model.model.layers)):
            pks += self.lens(view, rows, by_chunk=False)
            if heads := self.chosen.get(view.number):
                blocks = in_blocks(len(heads) * token_ids.shape[1], rows)
                share = self.percent, self.most
                parts = [top_share(view.attention(heads, block), prompt_range, *share) for (block,) in blocks]
                chosen.append(torch.cat([mask for mask, _ in parts], 2))
                gaps.append(torch.cat([gap for _, gap in parts], 2))
            final = view.after
        final_BTD = self.base.normed(final)
        ecs = [self._resemblance(mask, final_BTD, rows) for mask in chosen]
        return torch.cat(ecs, 1).transpose(1, 2), torch.stack(pks, -1), torch.cat(gaps, 1).transpose(1, 2)

    def _resemblance(self, chosen_BHRT: Tensor, final_BTD: Tensor, rows_BR: Tensor) -> Tensor:
        blocks = in_blocks(chosen_BHRT.shape[1] * chosen_BHRT.shape[3], rows_BR, chosen_BHRT)
        return torch.cat([resemblance(mask, final_BTD, rows) for rows, mask in blocks], 2)


class ChunkDetector(Detector):
    """By chunk: a head's choice is one chunk of the prompt, compared with the answer's by a sentence encoder.

    Layers above the last one that is read do not run.
    """

    def __init__(self, config: Mapping[str, Any], base: Decoder | None = None) -> None:
        super().__init__(config, base)
        self.encoder = SentenceEncoder(config["encoder"], config["encoder_revision"])
        self.count = 1 + max(*self.chosen, *self.lens_layers)

    def forward(
        self,
        token_ids: Tensor,
        rows: Tensor,
        prompt_range: Tensor,
        row_spans: Tensor,
        characters: Tensor,
        prompt_spans: Tensor,
        chunk_ids: Tensor,
        prompt_chunk_ids: Tensor,
    ) -> tuple[Tensor, ...]:
        given = token_ids, rows, prompt_range, row_spans, prompt_spans, chunk_ids, prompt_chunk_ids
        return self.score(self.features(*given), row_spans, characters)

    def features(
        self,
        token_ids: Tensor,
        rows: Tensor,
        prompt_range: Tensor,
        row_spans: Tensor,
        prompt_spans: Tensor,
        chunk_ids: Tensor,
        prompt_chunk_ids: Tensor,
    ) -> Features:
        inside_BCR = within(row_spans, rows.shape[1])
        range_B12 = prompt_range.unsqueeze(1)
        context_BST = within(prompt_spans, token_ids.shape[1]) * within(range_B12, token_ids.shape[1])
        likeness_BCS = self.likeness(chunk_ids, prompt_chunk_ids)
        pks, ecs, gaps = [], [], []
        for view in self.base.layers(token_ids, self.count):
            pks += self.lens(view, rows, by_chunk=True)
            if heads := self.chosen.get(view.number):
                weights_BHCS = self.attended(view, heads, rows, inside_BCR, context_BST)
                found = best_chunk(weights_BHCS, context_BST.sum(-1) > 0, likeness_BCS)
                ecs.append(found[0])
                gaps.append(found[1])
        return torch.cat(ecs, -1), pooled(torch.stack(pks, -1), inside_BCR, self.mean), torch.cat(gaps, -1)

    def likeness(self, chunk_ids: Tensor, prompt_chunk_ids: Tensor) -> Tensor:
        """[B, C, S]: cosines between the chunks of the answer and of the prompt."""
        own, context = (
            self.encoder(ids.flatten(0, 1)).unflatten(0, ids.shape[:2]) for ids in (chunk_ids, prompt_chunk_ids)
        )
        return own @ context.transpose(1, 2)

    def attended(self, view: View, heads: list[int], rows: Tensor, inside_BCR: Tensor, context_BST: Tensor) -> Tensor:
        """[B, H, C, S], summed up over blocks of rows."""
        blocks = in_blocks(len(heads) * context_BST.shape[-1], rows, inside_BCR)
        sums = [chunk_attention(view.attention(heads, part), inside, context_BST) for part, inside in blocks]
        total = sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)
        if not self.mean:
            return total
        sizes_BCS = inside_BCR.sum(-1).unsqueeze(-1) * context_BST.sum(-1).unsqueeze(1)
        return total / sizes_BCS.unsqueeze(1).clamp_min(1)


def build_detector(config: Mapping[str, Any]) -> Detector:
    """The detector of the config's level."""
    return ChunkDetector(config) if config["level"] == "chunk" else TokenDetector(config)


class Scorer(nn.Module):
    """The trained part: features in, scores out. It is fitted without gradients, so that it has buffers only."""

    uses_head: Tensor
    uses_layer: Tensor
    mix: Tensor
    ecs_bounds: Tensor
    pks_bounds: Tensor
    bounds: Tensor

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.heads, self.layers = heads_of(config), layers_of(config)
        self.by_token = config["level"] == "token"
        members = config["members"]
        self.register_buffer("uses_head", torch.ones(members, len(self.heads)))
        self.register_buffer("uses_layer", torch.ones(members, len(self.layers)))
        self.register_buffer("mix", torch.tensor([[1.0, 0.6]]).repeat(members, 1))  # m, alpha
        self.register_buffer("ecs_bounds", torch.tensor([[0.0, 1.0]]).repeat(members, 1))
        self.register_buffer("pks_bounds", torch.tensor([[0.0, 1.0]]).repeat(members, 1))
        self.register_buffer("bounds", torch.tensor([-1.0, 1.0]))

    def _apply(self, convert: Any, recurse: bool = True) -> "Scorer":
        """Move with the rest of the module, but stay in float32."""
        moved: Scorer = super()._apply(lambda tensor: tensor.to(convert(tensor).device), recurse)
        return moved

    def forward(self, ecs_BCH: Tensor, pks_BCL: Tensor, lengths_BC: Tensor) -> tuple[Tensor, Tensor]:
        """(scores [B, C], 0 for a chunk without tokens; response scores [B], 0..1)."""
        ecs_BCM = _scaled(ecs_BCH @ self.uses_head.T, self.ecs_bounds)
        pks_BCM = _scaled(pks_BCL @ self.uses_layer.T, self.pks_bounds)
        raw_BC = (pks_BCM * self.mix[:, 0] - ecs_BCM * self.mix[:, 1]).mean(-1)
        real_BC = lengths_BC > 0
        scores_BC = torch.where(real_BC, (raw_BC - self.bounds[0]) / (self.bounds[1] - self.bounds[0]), 0.0)
        weights_BC = (lengths_BC if self.by_token else real_BC).float()
        response_B = (scores_BC * weights_BC).sum(-1) / weights_BC.sum(-1).clamp_min(1)
        return scores_BC, response_B.clamp(0, 1)


class ScorerAlone(nn.Module):
    """The scorer over given features."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.scorer = Scorer(config)

    def forward(self, ecs: Tensor, pks: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        scores_BC, response_B = self.scorer(ecs, pks, lengths)
        return scores_BC, response_B


def _scaled(values_BCM: Tensor, bounds_M2: Tensor) -> Tensor:
    width_M = bounds_M2[:, 1] - bounds_M2[:, 0]
    return (values_BCM - bounds_M2[:, 0]) / torch.where(width_M == 0, 1.0, width_M)
