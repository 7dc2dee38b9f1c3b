"""Embeddings of texts in batches of similar length, of a size that fits the memory."""

import os
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn

from runtimes.artifact import ASSETS
from runtimes.cache.store import buckets
from runtimes.errors import EngineError, InputError
from runtimes.text_pipeline import Tokens, padded
from training.checkpoint import Checkpoint, restore
from training.spec import ModelSpec

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
ON_A_CPU = 1024  # tokens of a batch with its padding: on a CPU, larger ones are slower
SHARE = 0.5  # of the available memory, for a batch


class Embedder:
    """A module with its tokenizer on a device; `precision` is that of its matrix products.

    padded_size  tokens of a batch with its padding; 0 derives it from the available memory
    """

    def __init__(
        self, module: nn.Module, tokens: Tokens, *, device: str = "auto", precision: str = "fp32", padded_size: int = 0
    ) -> None:
        if precision not in DTYPES:
            raise InputError(f"expected a precision of {', '.join(DTYPES)}; found '{precision}'")
        here = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" != here:
            raise EngineError("expected a GPU that torch can use, found none; give --device cpu")
        self.device = torch.device(here if device == "auto" else device)
        if self.device.type == "cuda":  # of several, the one that torchrun assigns
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        self.module = module.to(self.device).eval()
        self.tokens = tokens
        half = DTYPES[precision]
        self.cast: Any = torch.autocast(self.device.type, half) if half else nullcontext()
        self.padded_size = padded_size or fitting(module, self.device)

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [texts, width], each row that of its text; `InputError` for a text without any token."""
        rows = self.tokens.rows(texts)
        lengths = [len(row) for row in rows]
        if not min(lengths):
            raise InputError(f"text {lengths.index(0)}: expected a text with tokens, found none")
        found: list[Any] = [None] * len(texts)
        for batch in buckets(range(len(texts)), lengths, self.padded_size):
            for i, vector in zip(batch, self._vectors([rows[i] for i in batch]), strict=True):
                found[i] = vector
        return np.stack(found)

    def _vectors(self, rows: Sequence[np.ndarray]) -> np.ndarray:
        """The vectors of a batch; one that does not fit the device is halved, and so are later ones."""
        ids, mask = (torch.from_numpy(each).to(self.device) for each in padded(rows, self.tokens.pad))
        try:
            with self.cast:
                vectors: np.ndarray = self.module(ids, mask)[0].float().cpu().numpy()
            return vectors
        except torch.OutOfMemoryError:
            if len(rows) == 1:
                raise
        self.padded_size = min(self.padded_size, ids.numel() // 2)
        half = len(rows) // 2
        return np.concatenate([self._vectors(rows[:half]), self._vectors(rows[half:])])


def open_embedder(checkpoint: Checkpoint, spec: ModelSpec, **options: Any) -> Embedder:
    """A checkpoint's model, its adapters merged, with the tokenizer that it was trained with."""
    tokens = Tokens.load(checkpoint.folder / ASSETS / "tokenizer.json", checkpoint.config["max_tokens"], "first")
    return Embedder(restore(checkpoint, spec), tokens, **options)


def fitting(module: nn.Module, device: torch.device) -> int:
    """Tokens of a batch that fit into half of the memory that is free, a power of two.

    An upper estimate: a layer's activations and its attention scores, which some kernels do not store.
    """
    config: Any = module.base.config  # type: ignore[union-attr]
    wide = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    scores = config.num_attention_heads * 256
    token_bytes = 4 * (8 * config.hidden_size + 3 * wide + 2 * scores)
    if device.type == "cuda":
        free, most = torch.cuda.mem_get_info(device)[0], 1 << 20
    else:
        import psutil

        free, most = psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), ON_A_CPU
    tokens = max(1, min(most, int(SHARE * free) // token_bytes))
    return 1 << (tokens.bit_length() - 1)
