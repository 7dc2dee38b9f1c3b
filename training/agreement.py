"""Agreement of the decisions of a converted model with the original's, where rounding may decide a near-tie."""

import numpy as np

from runtimes.artifact import Check
from training.spec import Tolerance


def share(flags: np.ndarray) -> float:
    """The share of true flags; 1 where there are none."""
    return float(flags.mean()) if flags.size else 1.0


def is_clear(margins: np.ndarray, want: np.ndarray, tolerance: Tolerance) -> np.ndarray:
    """bool [...]: where the margin of a decision is more than twice the tolerance at the largest number of `want`."""
    clear: np.ndarray = margins > 2 * (tolerance.absolute + tolerance.relative * np.abs(want).max())
    return clear


def choice_margins(scores: np.ndarray) -> np.ndarray:
    """[...]: the difference between the two largest of the scores [..., classes]."""
    top = np.partition(scores, -2)
    return np.asarray(top[..., -1] - top[..., -2])


def same_choices(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """bool [...]: where the largest of the scores [..., classes] is the same; false where `got` is not finite."""
    return np.asarray((got.argmax(-1) == want.argmax(-1)) & np.isfinite(got).all(-1))


def clear_choices(got: np.ndarray, want: np.ndarray, tolerance: Tolerance) -> Check:
    """All choices must be the original's, except near-ties of the original."""
    clear = is_clear(choice_margins(want), want, tolerance)
    return Check(value=share(same_choices(got, want)[clear]), limit=1.0, at_least=True)


def smallest_cosine(got: np.ndarray, want: np.ndarray) -> float:
    """The smallest cosine between a row of `got` and the same row of `want`; NaN if either holds one."""
    one, other = got.astype(np.float64), want.astype(np.float64)
    norms = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
    return float(((one * other).sum(-1) / norms).min())
