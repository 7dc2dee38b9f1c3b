"""Texts become vectors in batches of like length, as many tokens at a time as the memory holds."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from runtimes.caching import buckets
from runtimes.errors import InputError
from runtimes.texts import Tokens, padded

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
TOKENS = 4096  # of a batch with its padding: on a CPU, more is no faster
SHARE = 0.5  # of the memory there is that a batch may take


class Embedder:
    """A module with its tokenizer on a device; `precision` is that of its matrix products."""

    def __init__(
        self,
        module: nn.Module,
        tokens: Tokens,
        *,
        device: str = "auto",
        precision: Precision = "fp32",
        padded_size: int = TOKENS,
    ) -> None:
        here = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(here if device == "auto" else device)
        self.module = module.to(self.device).eval()
        self.tokens, self.padded_size = tokens, padded_size
        half = DTYPES.get(precision)
        self.cast: Any = torch.autocast(self.device.type, half) if half else nullcontext()

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [texts, width], each row that of its text; `InputError` for a text without any token."""
        rows = self.tokens.rows(texts)
        lengths = [len(row) for row in rows]
        if not min(lengths, default=1):
            raise InputError(f"text {lengths.index(0)}: expected a text, found none in {ascii(texts[lengths.index(0)])[:40]}")
        result: Any = None
        for batch in buckets(range(len(texts)), lengths, self.padded_size):
            ids, mask = (torch.from_numpy(each).to(self.device) for each in padded([rows[i] for i in batch], 0))
            with self.cast:
                vectors = self.module(ids, mask)[0].float().cpu().numpy()
            if result is None:
                result = np.empty((len(texts), vectors.shape[1]), np.float32)
            result[batch] = vectors
        return result
