"""ECS, the similarity of attended context and answer; PKS, the change of the prediction by feed-forward parts.

Source: Sun et al., ReDeEP, ICLR 2025, sections 3 and 4, and their code where an option is called `published`.

Shapes: B batch, T tokens, R rows, D width, H heads, C chunks of the answer, S chunks of the prompt, V vocabulary.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from training.models.hallucination.decoder import Decoder, View, take

LOG_2 = math.log(2)
BLOCK_NUMBERS = 1 << 23  # float32 that one intermediate result of a block of rows may hold
NEVER = -1.0  # below every probability
PUBLISHED_SCALE = 1e6
SMALLEST = 1e-12
SMALLEST_SUM = 1e-37


def divergence(one: Tensor, other: Tensor, variant: str, by_chunk: bool) -> Tensor:
    """[...] from logits [..., V].

    `paper` is the Jensen-Shannon divergence, 0 to ln 2. `published` is half of KL(M || P) + KL(M || Q), M their mean:
    the authors' code, which calls torch's kl_div with its arguments exchanged; by token it is a mean over the
    vocabulary times a million.
    """
    if variant == "paper":
        p, q = torch.softmax(one, -1), torch.softmax(other, -1)
        # log(p / m) as log(1 + d): the logarithms of nearly equal numbers would differ by their rounding only.
        d = (p - q) / (p + q).clamp_min(SMALLEST_SUM)
        return 0.5 * (p * _log_above(1 + d) + q * _log_above(1 - d)).sum(-1)
    log_p, log_q = torch.log_softmax(one, -1), torch.log_softmax(other, -1)
    log_m = torch.maximum(log_p, log_q) + torch.log1p(torch.exp(-(log_p - log_q).abs())) - LOG_2
    terms = 0.5 * log_m.exp() * ((log_m - log_p) + (log_m - log_q))
    return terms.sum(-1) if by_chunk else terms.mean(-1) * PUBLISHED_SCALE


def _log_above(ratio: Tensor) -> Tensor:
    """The logarithm, finite where the ratio is 0, where its factor is 0 as well."""
    return ratio.clamp_min(SMALLEST).log()


def knowledge(decoder: Decoder, view: View, rows_BR: Tensor, variant: str, by_chunk: bool) -> Tensor:
    """PKS of one layer, float32 [B, R], in blocks of rows: there are never more than two distributions of a block."""
    vocabulary = decoder.model.config.vocab_size

    parts = []
    for (rows_Br,) in in_blocks(vocabulary, rows_BR):
        middle, after = (decoder.logits(take(states, rows_Br)) for states in (view.middle, view.after))
        parts.append(divergence(middle, after, variant, by_chunk))
    return torch.cat(parts, 1)


def in_blocks(numbers_per_row: int, rows_BR: Tensor, *more: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows and tensors with an axis of rows, in blocks that keep intermediate results small.

    `more` has its rows in axis 2. An exported program has one block: it cannot loop over an unknown number.
    """
    if torch.compiler.is_exporting():
        yield rows_BR, *more
        return
    size = max(1, BLOCK_NUMBERS // (rows_BR.shape[0] * numbers_per_row))
    yield from zip(rows_BR.split(size, 1), *(values.split(size, 2) for values in more), strict=True)


def within(spans: Tensor, length: int) -> Tensor:
    """float32 [B, C, length]: 1 where a place is in the span [B, C, 2]."""
    places = torch.arange(length, device=spans.device)
    return ((places >= spans[..., :1]) & (places < spans[..., 1:])).float()


def pooled(values_BRX: Tensor, inside_BCR: Tensor, mean: bool) -> Tensor:
    """The mean, or the sum, of rows over each span [B, C, X]; 0 for an empty one."""
    totals_BCX = inside_BCR @ values_BRX
    return totals_BCX / inside_BCR.sum(-1, keepdim=True).clamp_min(1) if mean else totals_BCX


def top_share(attention_BHRT: Tensor, range_B2: Tensor, percent: int, most: int) -> tuple[Tensor, Tensor]:
    """(bool [B, H, R, T], gap [B, H, R]): the `percent` of the context that each row attends to most.

    At least one position is taken, and at most that share of `most`. The gap is the difference between the last taken
    and the first not taken, relative to the former.
    """
    places_T = torch.arange(attention_BHRT.shape[-1], device=range_B2.device)
    inside_BT = (places_T >= range_B2[:, :1]) & (places_T < range_B2[:, 1:])
    seen_BHRT = attention_BHRT.masked_fill(~inside_BT[:, None, None, :], NEVER)
    count_B = ((range_B2[:, 1] - range_B2[:, 0]) * percent // 100).clamp_min(1)
    # More than the share: one is always taken, and the first not taken is needed. torch.export accepts this only with
    # room for both.
    room = torch.nn.functional.pad(seen_BHRT, (0, most * percent // 100 + 1), value=NEVER)
    best_BHRK = torch.topk(room, attention_BHRT.shape[-1] * percent // 100 + 2, -1).values
    last_BHR1 = _at(best_BHRK, count_B - 1)
    next_BHR1 = _at(best_BHRK, count_B)
    gap_BHR = ((last_BHR1 - next_BHR1) / last_BHR1.clamp_min(SMALLEST)).squeeze(-1)
    return seen_BHRT >= last_BHR1, gap_BHR


def resemblance(chosen_BHRT: Tensor, final_BTD: Tensor, rows_BR: Tensor) -> Tensor:
    """ECS by token [B, H, R]: cosine of the mean final state of the attended tokens and the row's own."""
    weights_BHRT = chosen_BHRT.to(final_BTD.dtype)
    mean_BHRD = (weights_BHRT @ final_BTD.unsqueeze(1)).float() / weights_BHRT.float().sum(-1, keepdim=True)
    own_B1RD = take(final_BTD, rows_BR).float().unsqueeze(1)
    return cosine(mean_BHRD, own_B1RD)


def cosine(one: Tensor, other: Tensor) -> Tensor:
    """Along the last axis, which is lost; 0 where a vector is zero."""
    norms = one.norm(dim=-1) * other.norm(dim=-1)
    return (one * other).sum(-1) / norms.clamp_min(SMALLEST)


def chunk_attention(attention_BHRT: Tensor, inside_BCR: Tensor, context_BST: Tensor) -> Tensor:
    """[B, H, C, S]: the attention from each chunk of the answer to each of the prompt, summed up."""
    return inside_BCR.unsqueeze(1) @ attention_BHRT @ context_BST.transpose(1, 2).unsqueeze(1)


def best_chunk(weights_BHCS: Tensor, real_BS: Tensor, likeness_BCS: Tensor) -> tuple[Tensor, Tensor]:
    """(ECS by chunk, gap), both [B, C, H]: the likeness of the prompt's chunk that is attended to most.

    The gap is that to the second, relative to the first; 1 where there is only one.
    """
    seen_BHCS = weights_BHCS.masked_fill(~real_BS[:, None, None, :], NEVER)
    best_BHC = seen_BHCS.argmax(-1)
    likeness_BHCS = likeness_BCS.unsqueeze(1).expand(-1, weights_BHCS.shape[1], -1, -1)
    ecs_BHC = torch.gather(likeness_BHCS, -1, best_BHC.unsqueeze(-1)).squeeze(-1)
    places_S = torch.arange(weights_BHCS.shape[-1], device=real_BS.device)
    others_BHCS = seen_BHCS.masked_fill(places_S == best_BHC.unsqueeze(-1), NEVER)
    first_BHC, second_BHC = seen_BHCS.amax(-1), others_BHCS.amax(-1).clamp_min(0)
    gap_BHC = (first_BHC - second_BHC) / first_BHC.clamp_min(SMALLEST)
    return ecs_BHC.transpose(1, 2), gap_BHC.transpose(1, 2)


def _at(values_BHRK: Tensor, places_B: Tensor) -> Tensor:
    """[B, H, R, 1]: the value at each row's own place."""
    index = places_B[:, None, None, None].expand(-1, *values_BHRK.shape[1:3], 1)
    return torch.gather(values_BHRK, -1, index)
