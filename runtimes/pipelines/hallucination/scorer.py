"""The scorer alone: features of an answer's chunks in, their scores out."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from runtimes.errors import InputError
from runtimes.pipeline import Pipeline, Schema, array, record, refuse_no_requests, whole
from runtimes.tensors import Tensors, is_finite, require_finite

LABELS = ("faithful", "hallucinated")


class ScorerPipeline(Pipeline):
    """A request is `{ecs, pks, lengths}`: for each chunk its features by head and by layer, and its tokens.

    An answer is `{scores, response_score, label, threshold}`.
    """

    def encode(self, requests: Sequence[Any]) -> Tensors:
        """The tensors of the scorer; chunks that an answer does not have are padded with a length of 0."""
        refuse_no_requests(requests)
        rows = [self.read(request, f"request {i}") for i, request in enumerate(requests)]
        longest = max(len(row["lengths"]) for row in rows)
        return {name: np.stack([_padded(row[name], longest) for row in rows]) for name in ("ecs", "pks", "lengths")}

    def read(self, request: Any, where: str) -> Tensors:
        if not isinstance(request, dict) or request.keys() != {"ecs", "pks", "lengths"}:
            raise InputError(f"{where}: expected an object with ecs, pks and lengths; found {ascii(request)[:80]}")
        widths = {name: len(self.config[name].split()) for name in ("heads", "layers")}
        features = {
            name: _numbers(request[name], width, f"{where}, {name}")
            for name, width in (("ecs", widths["heads"]), ("pks", widths["layers"]))
        }
        lengths = request["lengths"]
        if not isinstance(lengths, list) or not lengths or any(type(n) is not int or n < 1 for n in lengths):
            raise InputError(f"{where}, lengths: expected the tokens of each chunk, found {ascii(lengths)[:80]}")
        for name, values in features.items():
            if len(values) != len(lengths):
                raise InputError(f"{where}, {name}: expected {len(lengths)} chunks, found {len(values)}")
        return {**features, "lengths": np.array(lengths, np.int64)}

    def decode(self, outputs: Mapping[str, np.ndarray]) -> list[Any]:
        require_finite(outputs)
        threshold = float(self.config["threshold"])
        return [
            {
                "scores": scores.tolist(),
                "response_score": float(score),
                "label": LABELS[bool(score >= threshold)],
                "threshold": threshold,
            }
            for scores, score in zip(outputs["scores"], outputs["response_score"], strict=True)
        ]

    def schema(self) -> Schema:
        heads, layers = (len(self.config[name].split()) for name in ("heads", "layers"))
        features = {
            name: array(array({"type": "number"}, width, width), 1) for name, width in (("ecs", heads), ("pks", layers))
        }
        return record({**features, "lengths": array(whole(1), 1)})

    def example(self) -> Any:
        heads, layers = (len(self.config[name].split()) for name in ("heads", "layers"))
        return {"ecs": [[0.7] * heads, [0.6] * heads], "pks": [[0.1] * layers, [0.2] * layers], "lengths": [20, 31]}


def _numbers(rows: Any, width: int, where: str) -> np.ndarray:
    """float32 [chunks, width]; `InputError` for anything else, NaN included."""
    right = isinstance(rows, list) and rows and all(isinstance(row, list) and len(row) == width for row in rows)
    if not right or any(type(value) not in (int, float) for row in rows for value in row):
        raise InputError(f"{where}: expected {width} numbers for each chunk, found {ascii(rows)[:80]}")
    values = np.array(rows, np.float32)
    if not is_finite(values):
        raise InputError(f"{where}: expected finite numbers, found NaN or infinity")
    return values


def _padded(values: np.ndarray, length: int) -> np.ndarray:
    return np.pad(values, [(0, length - len(values)), *[(0, 0)] * (values.ndim - 1)])
