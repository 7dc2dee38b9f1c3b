"""How well scores tell hallucinated from faithful: AUC, correlation, mutual information, a threshold, intervals."""

import numpy as np

from training.config import Metrics

BINS = 10
RESAMPLES = 1000


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """The chance that a positive scores above a negative, ties counting half; NaN without both."""
    positive = labels == 1
    count = int(positive.sum())
    if not 0 < count < len(labels):
        return float("nan")
    _, places, sizes = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = np.cumsum(sizes) - (sizes - 1) / 2  # of each distinct score, from 1, ties in the middle
    return float((ranks[places[positive]].sum() - count * (count + 1) / 2) / (count * (len(labels) - count)))


def correlation(labels: np.ndarray, scores: np.ndarray) -> float:
    """Pearson's r; NaN if either does not vary."""
    if np.ptp(scores) == 0 or np.ptp(labels) == 0:
        return float("nan")
    return float(np.corrcoef(labels, scores)[0, 1])


def mutual_information(labels: np.ndarray, values: np.ndarray) -> float:
    """Nats that `values`, in ten bins of like size, tell about `labels`."""
    edges = np.quantile(values, np.linspace(0, 1, BINS + 1)[1:-1])
    table = np.bincount(2 * np.searchsorted(edges, values, "right") + labels, minlength=2 * BINS).reshape(-1, 2)
    joint = table / table.sum()
    apart = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    there = joint > 0
    return float((joint[there] * np.log(joint[there] / apart[there])).sum())


def best_threshold(labels: np.ndarray, scores: np.ndarray) -> float:
    """The score from which on calling a response hallucinated has the best F1; the highest such score."""
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(labels[order] == 1)
    f1 = 2 * hits / (np.arange(1, len(order) + 1) + (labels == 1).sum())
    last_of_its_kind = np.append(np.diff(scores[order]) != 0, True)
    f1 = np.where(last_of_its_kind, f1, -1.0)
    return float(scores[order][int(f1.argmax())])


def at_threshold(labels: np.ndarray, called: np.ndarray) -> Metrics:
    """Precision, recall and F1 of those `called` hallucinated, a bool array."""
    hits = int((called & (labels == 1)).sum())
    positive, true = int(called.sum()), int((labels == 1).sum())
    return {
        "precision": hits / max(positive, 1),
        "recall": hits / max(true, 1),
        "f1": 2 * hits / max(positive + true, 1),
    }


def intervals(labels: np.ndarray, scores: np.ndarray, seed: int = 0) -> Metrics:
    """95 % bootstrap intervals of AUC and PCC over responses; resamples of one class are left out."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, len(labels), (RESAMPLES, len(labels)))
    found = np.array([(auc(labels[row], scores[row]), correlation(labels[row], scores[row])) for row in rows])
    found = found[np.isfinite(found).all(1)]
    if not len(found):
        return {name: float("nan") for name in ("auc_low", "auc_high", "pcc_low", "pcc_high")}
    low, high = np.percentile(found, [2.5, 97.5], axis=0)
    return {
        "auc_low": float(low[0]),
        "auc_high": float(high[0]),
        "pcc_low": float(low[1]),
        "pcc_high": float(high[1]),
    }
