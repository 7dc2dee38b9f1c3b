"""Rows of a results file and cells of an export, made by hand."""

from typing import Any

import numpy as np

Row = dict[str, Any]


def row(engine: str, ms: float, *, precision: str = "fp32", scenario: str = "single-stream", **changes: Any) -> Row:
    """A row of the model `toy` as runtimes.bench writes it."""
    samples = (ms * 1e-3 * np.random.default_rng(0).lognormal(0, 0.1, 100)).tolist()
    head = {"model": "toy", "target": "torch" if "torch" in engine else "onnx", "precision": precision}
    figures = {f"p{p}_s": float(np.percentile(samples, p)) for p in (50, 90, 95)} | {"p99_s": None}
    return {
        **head,
        **{"engine": engine, "scenario": scenario, "sizes": {"batch": 1, "tokens": 16}, **figures},
        **{"agreement": 1.0, "agreement_check": "same", "difference": 0.1, "provider": "toy", "stable": True},
        **{"load_s": 0.5, "first_call_s": 0.01, "warmup_s": 0.2, "warmup_calls": 10, "rows_per_s": 1e3 / ms},
        **{"cpu_s_per_call": ms * 1e-3, "device_p50_s": None, "memory_bytes": int(ms * 50e6), "gpu_memory_bytes": None},
        **{"run_medians_s": [ms * 1e-3], "windows": [100], "samples_s": samples},
        **changes,
    }


ROWS = [
    row("torch", 4.0),
    row("torch.compile", 2.0, stable=False),
    row("onnx", 1.0),
    row("onnx", 0.5, precision="int8", agreement=0.97),
    {**row("openvino", 1.0), "failed": "openvino cannot <open> it"},
    *(
        row("onnx", 1.0 * n, scenario="offline", sizes={"batch": n, "tokens": 16}, rows_per_s=900.0 + 100 * n)
        for n in (1, 2, 4)
    ),
    *(row("triton", 2.0 * n, scenario="concurrency", lanes=n, knee=n == 2) for n in (1, 2, 4)),
    row("onnx", 3.0, scenario="server", rate_per_s=50.0, bound_s=0.1, goodput_per_s=49.0, late_share=0.25),
]  # fmt: skip
ENVIRONMENT = {
    "cpu": "Toy CPU",
    "cpus": 2,
    "gpu": None,
    "threads": 1,
    "load": [0.5, 0.4, 0.3],
    "versions": {"numpy": "2"},
}


def cell(target: str, precision: str = "fp32", status: str = "ok", reason: str = "", **changes: Any) -> Row:
    facts = {"built": True, "deserialized": True, "ran": True, "compared": True}
    parity = {"difference_y": 0.123, "same": 1.0}
    outcome = {"model": "toy", "target": target, "precision": precision, "status": status, "reason": reason}
    return {**outcome, "bytes": 1_300_000, "parity": parity, "facts": facts, **changes}
