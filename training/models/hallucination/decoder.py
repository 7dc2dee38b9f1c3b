"""A frozen decoder run layer by layer, so that only one layer's activations are in memory.

Source: the layers of Llama, Mistral and Qwen2 in Hugging Face's modules, quantised or spread over devices. There is no
attention mask: texts are padded on the right, which a causal model does not read.

Shapes: B batch, T tokens, R rows (positions that predict the answer's tokens), D width, A heads, K key heads,
H chosen heads, C width of a head, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.frozen import FrozenModule
from training.models.hallucination.frozen import load_decoder

NOWHERE = -1e30  # a score of attention that becomes exactly 0; not infinite, or a row of padding would be NaN


@dataclass(frozen=True, slots=True)
class View:
    """One layer after it has run.

    queries  after rotation, [B, A, T, C]
    keys     after rotation, [B, K, T, C]
    middle   the residual states [B, T, D] after attention, before the feed-forward part
    after    the residual states after both
    """

    number: int
    queries: Tensor
    keys: Tensor
    middle: Tensor
    after: Tensor
    scaling: float

    def attention(self, heads: Sequence[int], rows_BR: Tensor) -> Tensor:
        """float32 [B, H, R, T]: the attention of these heads from these rows."""
        groups = self.queries.shape[1] // self.keys.shape[1]
        queries_BHRC = take(self.queries[:, list(heads)], rows_BR.unsqueeze(1))
        keys_BHTC = self.keys[:, [head // groups for head in heads]]
        scores_BHRT = (queries_BHRC @ keys_BHTC.transpose(2, 3)).float() * self.scaling
        places_T = torch.arange(keys_BHTC.shape[2], device=rows_BR.device)
        later_B1RT = (places_T > rows_BR.unsqueeze(-1)).unsqueeze(1)
        return torch.softmax(scores_BHRT.masked_fill(later_B1RT, NOWHERE), -1)


class Decoder(FrozenModule):
    """The language model; its own `forward` is unchanged and not used."""

    def __init__(self, source: str, revision: str, model: Any = None) -> None:
        super().__init__()
        self.model: Any = model if model is not None else load_decoder(source, revision)
        rope = self.model.model.rotary_emb
        self.frequencies = tuple(rope.inv_freq.double().tolist())  # a buffer would be rounded with the parameters
        self.rope_scale = float(rope.attention_scaling)
        self.run_layer: Any = layer_outputs  # may be compiled

    def layers(self, ids_BT: Tensor, count: int) -> Iterator[View]:
        """The first `count` layers, one after the other; a layer's activations are released when the next one runs."""
        states_BTD = self.model.model.embed_tokens(ids_BT)
        cosines, sines = self.rotation(ids_BT.shape[1], states_BTD)
        for number, layer in enumerate(self.model.model.layers[:count]):
            queries, keys, middle, states_BTD = self.run_layer(layer, states_BTD, cosines, sines)
            yield View(number, queries, keys, middle, states_BTD, float(layer.self_attn.scaling))

    def rotation(self, length: int, like: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        """Cosines and sines [T, C] of `length` rotary positions from `start` on."""
        frequencies = torch.tensor(self.frequencies, dtype=torch.float32, device=like.device)
        angles = (torch.arange(length, device=like.device) + start).float().unsqueeze(1) * frequencies
        angles = torch.cat([angles, angles], -1)
        return tuple((table * self.rope_scale).to(like.dtype) for table in (angles.cos(), angles.sin()))  # type: ignore[return-value]

    def normed(self, states: Tensor) -> Tensor:
        """The states after the final norm, which the output matrix takes."""
        result: Tensor = self.model.model.norm(states)
        return result

    def logits(self, states: Tensor) -> Tensor:
        """float32 [..., V]: the logit lens of a residual state."""
        result: Tensor = self.model.lm_head(self.normed(states)).float()
        return result


def layer_outputs(layer: Any, states: Tensor, cosines: Tensor, sines: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(queries, keys, middle, after) of one layer."""
    queries, keys, values = projected(layer, states, cosines, sines)
    mixed = attend(queries, keys, values, float(layer.self_attn.scaling))
    added = layer.self_attn.o_proj(mixed.transpose(1, 2).flatten(2))
    middle = on_device_of(states, added) + added
    added = layer.mlp(layer.post_attention_layernorm(middle))
    return queries, keys, middle, on_device_of(middle, added) + added


def projected(layer: Any, states: Tensor, cosines: Tensor, sines: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(queries [B, A, T, C], keys, values [B, K, T, C]) of one layer, queries and keys after rotation."""
    attention = layer.self_attn
    normed = layer.input_layernorm(states)
    queries, keys, values = (
        project(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    cosines, sines = on_device_of(cosines, queries), on_device_of(sines, queries)
    return rotated(queries, cosines, sines), rotated(keys, cosines, sines), values


def attend(queries: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """Causal attention [B, A, T, C]: by torch's own kernel, whose memory is linear, or written out for export."""
    groups = queries.shape[1] // keys.shape[1]
    if not torch.compiler.is_exporting():
        if groups > 1:
            keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scaling)
    places = torch.arange(queries.shape[2], device=queries.device)
    later = places.unsqueeze(0) > places.unsqueeze(1)
    # Heads that share keys are folded into one more axis, so that no key is copied.
    folded = queries.unflatten(1, (keys.shape[1], groups))
    scores = (folded @ keys.unsqueeze(2).transpose(3, 4)) * scaling
    weights = torch.softmax(scores.float().masked_fill(later, NOWHERE), -1).to(values.dtype)
    return (weights @ values.unsqueeze(2)).flatten(1, 2)


def rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary positions in Hugging Face's layout, which pairs the first half of a head with its second."""
    first, second = x.chunk(2, -1)
    return x * cosines + torch.cat([-second, first], -1) * sines


def take(values: Tensor, rows: Tensor) -> Tensor:
    """[..., R, X] from [..., T, X]: the rows [..., R] of each; leading axes of size 1 are shared."""
    index = rows.unsqueeze(-1).expand(*values.shape[:-2], rows.shape[-1], values.shape[-1])
    return torch.gather(values, -2, index)


def on_device_of(value: Tensor, other: Tensor) -> Tensor:
    """`value` on the device of `other`: layers may lie on several."""
    return value if value.device == other.device else value.to(other.device)


class TokenScores(nn.Module):
    """Token ids and mask int64 [B, T], padded on the right, become (log-probabilities, likeliest next ids) [B, T].

    The log-probability of a token is that after those before it; the first of a row has 0. Padding has 0 and 0.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        for view in self.decoder.layers(input_ids, len(self.decoder.model.model.layers)):
            states_BTD = view.after
        logits_BTV = self.decoder.logits(states_BTD)
        scores_BTV = logits_BTV[:, :-1].log_softmax(-1)
        scores_BT = nn.functional.pad(scores_BTV.gather(-1, input_ids[:, 1:, None]).squeeze(-1), (1, 0))
        real_BT = attention_mask > 0
        return torch.where(real_BT, scores_BT, 0.0), torch.where(real_BT, logits_BTV.argmax(-1), 0)
