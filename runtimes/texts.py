"""Texts as padded rows of token ids, newest tokens kept; and the pipeline of a model that reads such rows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.errors import EngineError, InputError, require
from runtimes.pipeline import Pipeline
from runtimes.tensors import Tensors

PADS = ("<pad>", "[PAD]")


class Tokens:
    """A tokenizer.json that cuts at `max_tokens`, special tokens included: what is oldest, or on another side."""

    def __init__(self, tokenizer_json: bytes, max_tokens: int, cut: str = "left") -> None:
        tokenizers = require("tokenizers", extra="strategy")
        self._tokenizer = tokenizers.Tokenizer.from_buffer(tokenizer_json)
        self._tokenizer.enable_truncation(max_tokens, direction=cut)
        self._tokenizer.no_padding()
        pads = (self._tokenizer.token_to_id(pad) for pad in PADS)
        self.pad = next((pad for pad in pads if pad is not None), 0)

    @classmethod
    def load(cls, path: Path, max_tokens: int, cut: str = "left") -> "Tokens":
        """The tokenizer in a file; `InputError` if there is none."""
        if not path.is_file():
            raise InputError(f"expected a tokenizer at {path}, found none; export the model again")
        return cls(path.read_bytes(), max_tokens, cut)

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """The number of tokens of each text, once it is cut."""
        return [len(encoding.ids) for encoding in self._tokenizer.encode_batch(list(texts))]

    def ids(self, texts: Sequence[str | tuple[str, str]]) -> np.ndarray:
        """int64 [texts, tokens], padded on the right to the longest; a text may be a pair."""
        rows = [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]
        result = np.full((len(rows), max(map(len, rows))), self.pad, np.int64)
        for row, ids in zip(result, rows, strict=True):
            row[: len(ids)] = ids
        return result


class TextPipeline(Pipeline):
    """A request is `{"text": ...}`; an answer is `{"vector": [...]}`."""

    tokenizer: str
    max_tokens: str  # the setting that holds it

    def __init__(self, config: Mapping[str, Any], assets: Path) -> None:
        super().__init__(config, assets)
        self.tokens = Tokens.load(assets / self.tokenizer, config[self.max_tokens])

    def encode(self, requests: Sequence[Any]) -> Tensors:
        """`token_ids` int64 [batch, tokens]."""
        for i, request in enumerate(requests):
            if not isinstance(request, dict) or request.keys() != {"text"} or not isinstance(request["text"], str):
                raise InputError(f"request {i}: expected an object with a string 'text'; found {ascii(request)[:80]}")
        return {"token_ids": self.tokens.ids([request["text"] for request in requests])}

    def decode(self, outputs: Mapping[str, np.ndarray]) -> list[Any]:
        (vectors,) = outputs.values()
        if not np.isfinite(vectors).all():
            raise EngineError("expected a finite vector, found NaN or infinity; run export.verify")
        return [{"vector": row.tolist()} for row in vectors]

    def example(self) -> Any:
        return {"text": "I lost my job last week and I cannot sleep."}
