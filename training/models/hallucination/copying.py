"""Which heads copy, read off the weights: python -m training.models.hallucination.copying --base SOURCE

A head copies what it attends to if W_U W_O W_V W_E, which maps each token of the vocabulary to what seeing it adds to
the logits, is large on its diagonal. Source: Sun et al., ReDeEP, ICLR 2025, after Elhage et al., 2021; without norms.

Shapes: V vocabulary, D width, C width of a head, L layers, A heads.
"""

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from runtimes.host.cli import command, parser, table
from training.models.hallucination.decoder import Decoder
from training.models.hallucination.settings import Head, head_text

BLOCK_ROWS = 1024  # of the vocabulary by the vocabulary
OUTLIER = 1.5  # spreads between the quartiles beyond them


@dataclass(frozen=True, slots=True)
class Copying:
    """float64 traces [L, A], and int64 outliers [L, A]: radii of Gershgorin's discs far from the others'."""

    traces: np.ndarray
    outliers: np.ndarray

    def best(self, count: int) -> list[Head]:
        """Heads by the sum of two ranks: of a large trace in size, and of few outliers."""
        ranks = _ranks(-np.abs(self.traces)) + _ranks(self.outliers)
        order = np.argsort(ranks, axis=None, kind="stable")[:count]
        return [(int(layer), int(head)) for layer, head in zip(*np.unravel_index(order, ranks.shape), strict=True)]


@torch.inference_mode()
def copying_scores(decoder: Decoder) -> Copying:
    """Of every head; the matrix of the vocabulary by the vocabulary is only ever there for a block of its rows."""
    model = decoder.model
    embed_VD, out_VD = model.model.embed_tokens.weight.float(), model.lm_head.weight.float()
    both_DD = embed_VD.T @ out_VD
    heads = model.config.num_attention_heads
    groups = heads // model.config.num_key_value_heads
    traces, outliers = [], []
    for layer in tqdm(model.model.layers, disable=not sys.stderr.isatty(), leave=False):
        attention = layer.self_attn
        out_ADC = attention.o_proj.weight.float().unflatten(1, (heads, -1)).transpose(0, 1)
        value_KCD = attention.v_proj.weight.float().unflatten(0, (heads // groups, -1))
        circuits = [(out_ADC[head], value_KCD[head // groups]) for head in range(heads)]
        traces.append([float((value @ both_DD * out.T).sum()) for out, value in circuits])
        outliers.append([_outliers(out_VD @ out, embed_VD @ value.T) for out, value in circuits])
    return Copying(np.array(traces), np.array(outliers))


def _outliers(to_logits_VC: Tensor, from_token_VC: Tensor) -> int:
    """How many discs of to_logits from_token^T have a radius that is an outlier."""
    radii = []
    for start in range(0, len(to_logits_VC), BLOCK_ROWS):
        rows = (to_logits_VC[start : start + BLOCK_ROWS] @ from_token_VC.T).abs()
        radii.append(rows.sum(1) - rows.diagonal(start))
    found = torch.cat(radii).double().cpu().numpy()
    low, high = np.quantile(found, [0.25, 0.75])
    room = OUTLIER * (high - low)
    return int(((found < low - room) | (found > high + room)).sum())


def _ranks(values: np.ndarray) -> np.ndarray:
    """The place of each value, 0 for the smallest."""
    result = np.empty(values.size, np.int64)
    result[np.argsort(values, axis=None, kind="stable")] = np.arange(values.size)
    return result.reshape(values.shape)


@command
def main(argv: list[str] | None = None) -> int:
    """Print the heads that copy most, best first, and as --heads takes them."""
    arguments = _parser().parse_args(argv)
    decoder = Decoder(arguments.base, arguments.revision)
    found = copying_scores(decoder.cuda() if torch.cuda.is_available() else decoder)
    best = found.best(arguments.top)
    rows = [(f"{head[0]}.{head[1]}", f"{found.traces[head]:.3f}", int(found.outliers[head])) for head in best]
    print(table(["head", "trace", "outliers"], rows))
    print(f"\n--heads '{head_text(tuple(best))}'")
    return 0


def _parser() -> Any:
    result = parser(
        "training.models.hallucination.copying",
        __doc__.partition(":")[0] + ".",
        "--base seeded:tiny --top 5",
        "--base meta-llama/Llama-2-7b-chat-hf --top 32",
    )
    result.add_argument("--base", required=True, help="Hugging Face folder or hub id of the decoder")
    result.add_argument("--revision", default="main", help="its revision (default: main)")
    result.add_argument("--top", type=int, default=32, help="how many heads (default: 32)")
    return result


if __name__ == "__main__":
    sys.exit(main())
