"""Metrics of predicted strategies, computed from the confusion matrix."""

from collections.abc import Sequence

import numpy as np

from training.config import Metrics

SWEEPS = 20
EPSILON = 1e-6
TINY = 1e-12


def confusion(true: Sequence[int] | np.ndarray, predicted: Sequence[int] | np.ndarray, classes: int) -> np.ndarray:
    """int64 [true, predicted] over all `classes`, those that never occur included."""
    return np.bincount(np.asarray(true) * classes + np.asarray(predicted), minlength=classes**2).reshape(classes, -1)


def measure(matrix: np.ndarray) -> Metrics:
    """Macro and weighted F1, accuracy and preference bias; the F1 of a class that never occurs is 0."""
    hits, true, predicted = np.diag(matrix), matrix.sum(1), matrix.sum(0)
    f1 = 2 * hits / np.maximum(true + predicted, 1)
    return {
        "macro_f1": float(f1.mean()),
        "weighted_f1": float(f1 @ true / true.sum()),
        "accuracy": float(hits.sum() / true.sum()),
        "preference_bias": preference_bias(matrix),
    }


def preference_bias(matrix: np.ndarray) -> float:
    """Spread of the model's preferences among strategies, 0 for none (Kang et al., ACL 2024, after Bradley-Terry).

    Sweeps over the classes one after the other, each using the preferences found so far.
    """
    classes = len(matrix)
    preference = np.ones(classes)
    for _ in range(SWEEPS):
        for i in range(classes):
            rivals = np.maximum(preference[i] + preference, TINY)  # two classes that are never predicted
            won = (matrix[:, i] * preference / rivals).sum()
            lost = (matrix[i] / rivals).sum()
            preference[i] = won / (lost + EPSILON)
        total = preference.sum()
        if not total:
            return 0.0
        preference *= classes / total
    return float(preference.std())
