"""The decoder, sizes and settings that the benchmarks of this folder share."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.config import Config
from training.models.hallucination.settings import TINY, resolve_config
from training.models.hallucination.spec import draw_inputs
from training.models.hallucination.training import SETTINGS as TRAINING

SIZES = {"batch": 1, "chunks": 4, "prompt_chunks": 12, "chunk_tokens": 32, "prompt_chunk_tokens": 48}
TOP_PERCENT = TINY["top_percent"]
SETTINGS: Config = {**TRAINING, "device": "cpu", "seed": 0}


def decoder_config(max_tokens: int, **changes: Any) -> Config:
    """The config of a detector with all heads and layers over a decoder with random weights."""
    return resolve_config(
        {**TINY, "base": "seeded:bench", "heads": "all", "layers": "all", "max_tokens": max_tokens, **changes}
    )


def prompt_and_answer(config: Config, tokens: int, rows: int) -> dict[str, np.ndarray]:
    """Random inputs of the detector: `tokens` of prompt and answer, of which `rows` are the answer."""
    return draw_inputs(config, np.random.default_rng(0), {**SIZES, "tokens": tokens, "rows": rows}, {})


def as_tensors(inputs: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(values) for name, values in inputs.items()}
