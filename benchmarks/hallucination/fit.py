"""The effect of selection, mutual information, an ensemble and the threshold on the AUC of a score log."""

import time
from typing import Any

from benchmarks.hallucination.bench_decoder import SETTINGS
from runtimes.errors import InputError
from runtimes.host.cli import table
from training.config import Config
from training.models.hallucination import fitting
from training.models.hallucination.metrics import at_threshold
from training.models.hallucination.recipe import length_for_pks
from training.models.hallucination.units import read_log


def bench_fitting(arguments: Any) -> str:
    """AUC, PCC and F1 on held-out sources, with the settings chosen on the others."""
    if not arguments.scores:
        raise InputError("fitting: expected --scores FILE with a score log, found none; name a score log")
    units = read_log(arguments.scores)
    labels = units.response_labels
    rows = []
    ways: dict[str, Config] = {
        "published settings": {"fit": "published"},
        "grid, ranked by AUC": {},
        "grid, ranked by mutual information": {"select": "mi"},
        "grid, ensemble of 5": {"ensemble": 5},
        "published settings, chunk length for PKS": {"fit": "published"},
    }
    for name, settings in ways.items():
        kept = length_for_pks(units) if "length" in name else units
        scores, called = fitting.held_out(kept, {**SETTINGS, **settings})
        found = fitting.measure(labels, scores, called)
        half = at_threshold(labels, scores >= 0.5)["f1"]
        rows.append((name, *(f"{value:.4f}" for value in (found["auc"], found["pcc"], found["f1"], half))))
    scorer = fitting.fit(units, SETTINGS)
    started = time.perf_counter()
    for _ in range(100):
        scorer.judge(units)
    per_call_ms = 10 * (time.perf_counter() - started)
    note = f"\n\nscoring {len(units.labels)} chunks: {per_call_ms:.2f} ms"
    return table(["held out by source", "AUC", "PCC", "F1", "F1 at 0.5"], rows) + note
