"""Hallucination detector: a context and an answer in, the answer's chunks with their scores out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.cache.answers import AnswerCache
from runtimes.errors import InputError
from runtimes.pipeline import Pipeline, Schema, refuse_no_requests
from runtimes.pipelines.hallucination.grounding import (
    EXAMPLE,
    GroundedTokens,
    Spans,
    Tokenized,
    read_request,
    request_schema,
)
from runtimes.tensors import Tensors, require_finite
from runtimes.text_pipeline import Tokens

ENCODER_TOKENIZER = "encoder_tokenizer.json"
LABELS = ("faithful", "hallucinated")


class DetectorCache(AnswerCache):
    """The answers of the detector by content."""

    model = "hallucination"


class HallucinationPipeline(Pipeline):
    """A request is `{contexts, question, answer}` or `{prompt, answer}`; `spans` and `prompt_spans` may be given.

    An answer is `{spans: [{start, end, score, ecs, pks}], response_score, label, threshold}`: characters of the answer,
    a higher score is more likely hallucinated; `ecs` and `pks` are the features by head and by layer.
    """

    cascade = DetectorCache

    def __init__(self, config: Mapping[str, Any], assets: Path) -> None:
        super().__init__(config, assets)
        self.tokens = GroundedTokens.load(assets, max_tokens=config["max_tokens"], max_rows=config["max_rows"])
        self.by_chunk = config["level"] == "chunk"
        if self.by_chunk:
            self.chunk_tokens = Tokens.load(assets / ENCODER_TOKENIZER, config["chunk_tokens"])

    def encode(self, requests: Sequence[Any]) -> Tensors:
        """The tensors of the detector, padded on the right; a padded chunk has an empty span."""
        refuse_no_requests(requests)
        return self.tensors([self.read(request, f"request {i}") for i, request in enumerate(requests)])

    def read(self, request: Any, where: str) -> Tokenized:
        """One request in tokens, its prompt cut where it is too long."""
        config = self.config
        most = config["max_chunks"], config["max_prompt_chunks"]
        text = read_request(request, where, config["chunk_characters"], most)
        for name, spans, limit in (("spans", text.spans, most[0]), ("prompt_spans", text.prompt_spans, most[1])):
            if len(spans) > limit:
                raise InputError(f"{where}: expected at most {limit} {name}, found {len(spans)}")
        return self.tokens.read(text.cut(config["max_characters"]), where)

    def tensors(self, texts: Sequence[Tokenized]) -> Tensors:
        tokens = max(self.shortest, *(len(text.ids) for text in texts))
        rows = max(text.answer[1] - text.answer[0] for text in texts)
        result = {
            "token_ids": padded([text.ids for text in texts], tokens),
            # Row t is the position before token t, which predicted the token.
            "rows": padded([range(text.answer[0] - 1, text.answer[1] - 1) for text in texts], rows),
            "prompt_range": np.array([self.columns(text) for text in texts], np.int64),
            "row_spans": padded_spans([text.spans for text in texts]),
            "characters": padded_spans([text.text.spans for text in texts]),
        }
        return {**result, **self.chunk_tensors(texts)} if self.by_chunk else result

    def columns(self, text: Tokenized) -> tuple[int, int]:
        """The positions that count as context for a head: the prompt, or all before the answer."""
        return text.prompt if self.config["columns"] == "prompt" else (0, text.answer[0])

    def chunk_tensors(self, texts: Sequence[Tokenized]) -> Tensors:
        """Where the prompt's chunks are, and both sides' chunks for the sentence encoder."""
        grounded = [text.text for text in texts]
        return {
            "prompt_spans": padded_spans([text.prompt_spans for text in texts]),
            "chunk_ids": self.chunk_ids([[text.answer[s:e] for s, e in text.spans] for text in grounded]),
            "prompt_chunk_ids": self.chunk_ids([[text.prompt[s:e] for s, e in text.prompt_spans] for text in grounded]),
        }

    def chunk_ids(self, chunks: Sequence[Sequence[str]]) -> np.ndarray:
        """int64 [batch, chunks, tokens]."""
        ids = self.chunk_tokens.ids([chunk for row in chunks for chunk in row])
        result = np.full((len(chunks), max(map(len, chunks)), max(2, ids.shape[1])), self.chunk_tokens.pad, np.int64)
        start = 0
        for row, own in zip(result, chunks, strict=True):
            row[: len(own), : ids.shape[1]] = ids[start : start + len(own)]
            start += len(own)
        return result

    @property
    def shortest(self) -> int:
        return int(self.config["min_tokens"])

    def decode(self, outputs: Mapping[str, np.ndarray]) -> list[Any]:
        require_finite({name: outputs[name] for name in ("ecs", "pks", "scores", "response_score")})
        return [self.answer({name: values[i] for name, values in outputs.items()}) for i in range(len(outputs["ecs"]))]

    def answer(self, row: Mapping[str, np.ndarray]) -> Any:
        threshold = float(self.config["threshold"])
        score = float(row["response_score"])
        spans = [
            {
                "start": int(start),
                "end": int(end),
                "score": float(row["scores"][i]),
                "ecs": row["ecs"][i].tolist(),
                "pks": row["pks"][i].tolist(),
            }
            for i, (start, end) in enumerate(row["spans"])
            if end > start
        ]
        return {
            "spans": spans,
            "response_score": score,
            "label": LABELS[bool(score >= threshold)],
            "threshold": threshold,
        }

    def schema(self) -> Schema:
        return request_schema((self.config["max_chunks"], self.config["max_prompt_chunks"]))

    def example(self) -> Any:
        return EXAMPLE


def padded(rows: Sequence[Sequence[int]], length: int) -> np.ndarray:
    """int64 [rows, length], zeros behind."""
    result = np.zeros((len(rows), length), np.int64)
    for row, values in zip(result, rows, strict=True):
        row[: len(values)] = values
    return result


def padded_spans(rows: Sequence[Spans]) -> np.ndarray:
    """int64 [rows, spans, 2], empty spans behind."""
    result = np.zeros((len(rows), max(map(len, rows)), 2), np.int64)
    for row, spans in zip(result, rows, strict=True):
        row[: len(spans)] = spans
    return result
