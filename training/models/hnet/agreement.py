"""Agreement of the boundaries and predictions of a converted H-Net with the original's.

Where p of a boundary is closer to one half than the rounding, both decisions are right, and the rest of that row
depends on the decision: such a row is compared up to there. Boundaries and bits per byte are compared everywhere.
"""

import numpy as np

from runtimes.artifact import Check
from runtimes.tensors import Tensors
from training.spec import Tolerance

SAME_LIMIT, SAME_POSITIONS = 0.99, 200  # share of all boundaries; no check for fewer positions
BITS_LIMIT = 0.01  # bits per byte


def mask_near_ties(got: Tensors, want: Tensors, tolerance: Tolerance) -> Tensors:
    """`got`, replaced by `want` in each row from the first near-tie that was decided differently."""
    if got["boundary"].shape != want["boundary"].shape:
        return got
    after_BT = np.logical_or.accumulate(_flipped(got, want) & _near(want, tolerance), 1)

    def chosen(name: str) -> np.ndarray:
        followed = after_BT.reshape(*after_BT.shape, *[1] * (want[name].ndim - 2))
        return np.where(followed, want[name], got[name])

    # The state at the end of a row is another once a boundary was: in one step, it is compared as it is.
    timed = [name for name in got if got[name].shape[:2] == after_BT.shape and name in want]
    return {**got, **{name: chosen(name) for name in timed}}


def agreement(got: Tensors, want: Tensors, tolerance: Tolerance) -> dict[str, Check]:
    """`clear`: share of rows in which no boundary differs, or the first that does is a near-tie of the original.

    `boundaries`: share of equal boundaries. `bits`: the difference of bits per byte, on average over the text; for a
    step, the Kullback-Leibler divergence of its distribution from the original's in bits.
    """
    flipped_BT, near_BT = _flipped(got, want), _near(want, tolerance)
    first_B = flipped_BT.argmax(1)
    rows = np.arange(len(first_B))
    clear_B = ~flipped_BT.any(1) | near_BT[rows, first_B]
    checks = {"clear": Check(value=float(clear_B.mean()), limit=1.0, at_least=True)}
    same = got["boundary"] == want["boundary"]
    if same.size >= SAME_POSITIONS:
        checks["boundaries"] = Check(value=float(same.mean()), limit=SAME_LIMIT, at_least=True)
    return {**checks, **_bits(got, want)}


def bits_per_byte(outputs: Tensors) -> np.ndarray:
    """Of every row with a predicted byte in it: the mean cost of its bytes in bits. float64 [rows]"""
    read = (outputs["text_bytes"] >= 0).sum(1) - 1
    nats = outputs["nats"].astype(np.float64).sum(1)
    return nats[read > 0] / read[read > 0] / np.log(2)


def _bits(got: Tensors, want: Tensors) -> dict[str, Check]:
    if "nats" in want:
        printed, meant = bits_per_byte(got), bits_per_byte(want)
        apart = float(abs(printed.mean() - meant.mean())) if len(meant) else 0.0
    else:
        printed, meant = (_log_softmax(each["logits"]) for each in (got, want))
        apart = float((np.exp(meant) * (meant - printed)).sum(-1).mean() / np.log(2))
    return {"bits": Check(value=apart, limit=BITS_LIMIT)}


def _flipped(got: Tensors, want: Tensors) -> np.ndarray:
    """bool [batch, time]: where any stage decides differently; a p that is not finite is no decision."""
    differs = (got["boundary"] != want["boundary"]) | ~np.isfinite(got["boundary_prob"])
    return np.asarray(differs.any(-1))


def _near(want: Tensors, tolerance: Tolerance) -> np.ndarray:
    """bool [batch, time]: where p of any stage is within twice the tolerance of one half."""
    margin = 2 * (tolerance.absolute + tolerance.relative / 2)
    near = np.abs(want["boundary_prob"].astype(np.float64) - 0.5) <= margin
    return np.asarray(near.any(-1))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
