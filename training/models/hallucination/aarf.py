"""AARF: a step of generation that can listen more to the context and less to what the model knows by heart.

A step reads new tokens behind those whose keys and values are kept, says what comes next and how it came to that (ECS
and PKS of the last position, which a score is made of), and weighs the last position's heads and feed-forward parts by
factors that it is given. Source: Sun et al., ReDeEP, ICLR 2025, section 5, whose equation weighs what is added at the
position that predicts; their code scales the output of the attention block where the paper, and this, scale that of the
feed-forward part.

Shapes: B batch, T new tokens, P rows of the past, X = P + T, D width, L layers, A heads, K key heads, R questions to
one key head, H scored heads, M scored layers, C width of a head, V vocabulary.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from training.frozen import FrozenModule
from training.models.hallucination.decoder import NOWHERE, on_device_of, projected
from training.models.hallucination.features import divergence, resemblance, top_share
from training.models.hallucination.module import Detector


class MitigatedDecoder(FrozenModule):
    """The detector's decoder as a generator that scores every token, one step at a time.

    Row 0 of the past is looked at by nobody, so that no axis is ever empty: the token at place p is row p + 1.
    """

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.base = detector.base
        self.chosen, self.lens_layers, self.jsd = detector.chosen, detector.lens_layers, detector.jsd
        self.percent, self.most = detector.percent, detector.most

    def forward(
        self,
        token_ids: Tensor,
        keys: Tensor,
        values: Tensor,
        finals: Tensor,
        prompt_range: Tensor,
        attend: Tensor,
        know: Tensor,
    ) -> tuple[Tensor, ...]:
        """(logits [B, V], ECS [B, H], PKS [B, M], gaps [B, H], and of the new tokens keys, values and final states)."""
        base, model = self.base, self.base.model.model
        states_BTD = model.embed_tokens(token_ids)
        dtype, past = states_BTD.dtype, keys.shape[3]
        cosines, sines = base.rotation(token_ids.shape[1], states_BTD, past - 1)
        new_keys, new_values, chosen, gaps, pks = [], [], [], [], []
        for number, layer in enumerate(model.layers):
            queries_BATC, own_keys, own_values = projected(layer, states_BTD, cosines, sines)
            keys_BKXC, values_BKXC = (
                torch.cat([on_device_of(kept[:, number].to(dtype), own), own], 2)
                for kept, own in ((keys, own_keys), (values, own_values))
            )
            if heads := self.chosen.get(number):
                weights_BH1X = last_row(queries_BATC, keys_BKXC, heads, float(layer.self_attn.scaling))
                mask, gap = top_share(weights_BH1X, prompt_range + 1, self.percent, self.most)
                chosen.append(mask)
                gaps.append(gap)
            mixed_BATC = look_back(queries_BATC, keys_BKXC, values_BKXC, float(layer.self_attn.scaling))
            mixed_BATC = at_last(mixed_BATC, attend[:, number, :, None, None])
            added = layer.self_attn.o_proj(mixed_BATC.transpose(1, 2).flatten(2))
            middle_BTD = on_device_of(states_BTD, added) + added
            added = at_last(layer.mlp(layer.post_attention_layernorm(middle_BTD)), know[:, number, None, None])
            states_BTD = on_device_of(middle_BTD, added) + added
            if number in self.lens_layers:
                pks.append(self._changed(middle_BTD[:, -1], states_BTD[:, -1]))
            new_keys.append(own_keys)
            new_values.append(own_values)
        own_finals_BTD = base.normed(states_BTD)
        finals_BXD = torch.cat([finals.to(dtype), own_finals_BTD], 1)
        return (
            base.model.lm_head(own_finals_BTD[:, -1]).float(),
            self._resemblance(chosen, finals_BXD),
            torch.stack(pks, -1),
            torch.cat(gaps, 1)[..., 0],
            torch.stack(new_keys, 1).float(),
            torch.stack(new_values, 1).float(),
            own_finals_BTD.float(),
        )

    def _changed(self, middle_BD: Tensor, after_BD: Tensor) -> Tensor:
        """PKS of a layer at the last position [B]."""
        return divergence(self.base.logits(middle_BD), self.base.logits(after_BD), self.jsd, by_chunk=False)

    def _resemblance(self, chosen: list[Tensor], finals_BXD: Tensor) -> Tensor:
        """ECS [B, H] at the last position."""
        last_B1 = torch.ones_like(finals_BXD[:, :1, 0], dtype=torch.int64) * (finals_BXD.shape[1] - 1)
        return torch.cat([resemblance(mask, finals_BXD, last_B1) for mask in chosen], 1)[..., 0]


def last_row(queries_BATC: Tensor, keys_BKXC: Tensor, heads: list[int], scaling: float) -> Tensor:
    """float32 [B, H, 1, X]: where these heads look from the last position; never at row 0."""
    groups = queries_BATC.shape[1] // keys_BKXC.shape[1]
    keys_BHXC = keys_BKXC[:, [head // groups for head in heads]]
    scores_BH1X = (queries_BATC[:, heads, -1:] @ keys_BHXC.transpose(2, 3)).float() * scaling
    nobodys_X = torch.arange(keys_BKXC.shape[2], device=scores_BH1X.device) == 0
    return torch.softmax(scores_BH1X.masked_fill(nobodys_X, NOWHERE), -1)


def look_back(queries_BATC: Tensor, keys_BKXC: Tensor, values_BKXC: Tensor, scaling: float) -> Tensor:
    """Attention [B, A, T, C] of the new tokens to those before them and to themselves; never to row 0."""
    tokens, rows = queries_BATC.shape[2], keys_BKXC.shape[2]
    groups = queries_BATC.shape[1] // keys_BKXC.shape[1]
    places_X = torch.arange(rows, device=queries_BATC.device)
    own_T = torch.arange(tokens, device=queries_BATC.device) + (rows - tokens)
    seen_TX = (places_X > 0) & (places_X <= own_T.unsqueeze(1))
    # Heads that share keys ask as more rows of one head, so that no key is copied.
    queries_BKRC = queries_BATC.unflatten(1, (-1, groups)).flatten(2, 3)
    seen_RX = seen_TX.expand(groups, -1, -1).flatten(0, 1)
    mixed_BKRC = F.scaled_dot_product_attention(queries_BKRC, keys_BKXC, values_BKXC, attn_mask=seen_RX, scale=scaling)
    return mixed_BKRC.unflatten(2, (groups, -1)).flatten(1, 2)


def at_last(values: Tensor, factor: Tensor) -> Tensor:
    """[..., T, C] with the last of T times `factor` [..., 1, 1]."""
    places_T1 = torch.arange(values.shape[-2], device=values.device).unsqueeze(-1)
    factor = on_device_of(factor.to(values.dtype), values)
    return torch.where(places_T1 == values.shape[-2] - 1, values * factor, values)
