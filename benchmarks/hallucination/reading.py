"""Answers a CPU minute by precision, batching and compilation."""

import time
from typing import Any

import numpy as np

from benchmarks.hallucination.bench_decoder import SETTINGS, decoder_config
from runtimes.cache.store import Store
from runtimes.host.cli import table
from training.config import Config
from training.frozen_store import fill
from training.models.hallucination.data import synthetic_examples
from training.models.hallucination.reading import FeatureReader


def bench_reading(arguments: Any) -> str:
    """Answers a CPU minute, the weights of the layers, and how far PKS moves."""
    config = decoder_config(1024)
    examples = synthetic_examples(0, arguments.answers)
    exact: Any = None
    rows = []
    ways: dict[str, Config] = {
        "fp32, one at a time": {"padded_size": 1},
        "fp32, buckets of 8192 tokens": {},
        "fp32, compiled": {"compile": True},
        "bf16": {"loading": "bf16"},
        "int8": {"loading": "int8"},
        "nf4": {"loading": "nf4"},
    }
    for name, settings in ways.items():
        reader = FeatureReader(config, {**SETTINGS, **settings})
        reading = reader.reading(examples)
        reader.run(reading.texts[:2])
        with Store(memory_entries=1 << 30) as store:
            started = time.process_time()
            fill(store, reading, reader.training["padded_size"])
            minutes = (time.process_time() - started) / 60
            features = np.concatenate(store.namespace(reading.namespace, reading.identity).require(reading.texts, ""))
        layers = reader.detector.base.model.model.layers
        pks = features[:, -len(layers) :]  # the last columns, one for each layer
        exact = pks if exact is None else exact
        size = sum(weight.numel() * weight.element_size() for weight in layers.parameters()) / 2**20
        moved = np.median(np.abs(pks - exact) / exact)
        rows.append((name, f"{len(examples) / minutes:.0f}", f"{size:.1f}", f"{moved:.1e}"))
    return table(["decoder", "answers/CPU min", "layers, MiB", "PKS moves (median)"], rows)
