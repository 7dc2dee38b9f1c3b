"""Texts as padded rows of token ids; and the pipeline of a model that reads such rows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from runtimes.errors import InputError, require
from runtimes.pipeline import TEXT, Pipeline, Schema, record, refuse_no_requests
from runtimes.tensors import Tensors, require_finite

PADS = ("<pad>", "[PAD]")
Keep = Literal["last", "first"]


class Tokens:
    """A tokenizer.json that keeps the last or the first `max_tokens` of a text, special tokens included."""

    def __init__(self, tokenizer_json: bytes, max_tokens: int, keep: Keep = "last") -> None:
        tokenizers = require("tokenizers", extra="text")
        self._tokenizer = tokenizers.Tokenizer.from_buffer(tokenizer_json)
        self._tokenizer.enable_truncation(max_tokens, direction="left" if keep == "last" else "right")
        self._tokenizer.no_padding()
        pads = (self._tokenizer.token_to_id(pad) for pad in PADS)
        self.pad = next((pad for pad in pads if pad is not None), 0)

    @classmethod
    def load(cls, path: Path, max_tokens: int, keep: Keep = "last") -> "Tokens":
        """The tokenizer in a file; `InputError` if there is none."""
        if not path.is_file():
            raise InputError(f"expected a tokenizer at {path}, found none; export the model again")
        return cls(path.read_bytes(), max_tokens, keep)

    def rows(self, texts: Sequence[str | tuple[str, str]]) -> list[np.ndarray]:
        """The token ids of each text, int64; a text may be a pair. `InputError` for what is no Unicode text."""
        try:
            return [np.array(encoding.ids, np.int64) for encoding in self._tokenizer.encode_batch(list(texts))]
        except TypeError as error:  # JSON may hold "\ud800", which Python keeps in a string
            wrong = next(i for i, text in enumerate(texts) if not is_unicode(text))
            raise InputError(f"text {wrong}: expected Unicode, found half a surrogate pair") from error

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """The number of tokens of each text, once it is cut."""
        return [len(row) for row in self.rows(texts)]

    def ids(self, texts: Sequence[str | tuple[str, str]]) -> np.ndarray:
        """int64 [texts, tokens], padded on the right to the longest."""
        return padded(self.rows(texts), self.pad)[0]


def is_unicode(text: str | tuple[str, str]) -> bool:
    """False where half a surrogate pair stands alone, which has no bytes in UTF-8."""
    return not any("\ud800" <= character <= "\udfff" for part in text for character in part)


def padded(rows: Sequence[np.ndarray], pad: int, least: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Rows of token ids padded on the right to the longest, or to `least`, and the mask of what is real.

    Both int64 [rows, tokens].
    """
    ids = np.full((len(rows), max(least, *map(len, rows))), pad, np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
    return ids, mask


class TextPipeline(Pipeline):
    """A request is `{"text": ...}`; an answer is `{"vector": [...]}`."""

    tokenizer: str
    max_tokens: str  # the setting that holds it
    keep: Keep = "last"

    def __init__(self, config: Mapping[str, Any], assets: Path) -> None:
        super().__init__(config, assets)
        self.tokens = Tokens.load(assets / self.tokenizer, config[self.max_tokens], self.keep)

    def encode(self, requests: Sequence[Any]) -> Tensors:
        """`token_ids` int64 [batch, tokens]."""
        return {"token_ids": self.tokens.ids(read_texts(requests))}

    def decode(self, outputs: Mapping[str, np.ndarray]) -> list[Any]:
        require_finite(outputs)
        (vectors,) = outputs.values()
        return [{"vector": row.tolist()} for row in vectors]

    def schema(self) -> Schema:
        return record({"text": TEXT})

    def example(self) -> Any:
        return {"text": "I lost my job last week and I cannot sleep."}


def read_texts(requests: Sequence[Any]) -> list[str]:
    """The text of each request; `InputError` for no request, or with the number of one that is none."""
    refuse_no_requests(requests)
    for i, request in enumerate(requests):
        if not isinstance(request, dict) or request.keys() != {"text"} or not isinstance(request["text"], str):
            raise InputError(f"request {i}: expected an object with a string 'text'; found {ascii(request)[:80]}")
    return [request["text"] for request in requests]
