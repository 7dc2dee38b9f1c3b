"""One byte of an H-Net after another: a byte in, whether a segment begins there and what may follow out."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from runtimes.errors import InputError
from runtimes.pipeline import Pipeline, Schema, record, whole
from runtimes.pipelines.hnet.byte_text import VOCABULARY
from runtimes.tensors import Tensors, require_finite

LIKELIEST = 8


class HNetStepPipeline(Pipeline):
    """A request is `{"byte": 0..255}`, the next of a text that 254 begins; what came before, the server knows.

    An answer has p and decision of every stage, and the likeliest next bytes with their probabilities.
    """

    def encode(self, requests: Sequence[Any]) -> Tensors:
        """byte_ids int64 [batch, 1]"""
        rows = [_byte(request, row) for row, request in enumerate(requests)]
        if not rows:
            raise InputError("expected at least one request, found none")
        return {"byte_ids": np.array(rows, np.int64)[:, None]}

    def decode(self, outputs: Mapping[str, np.ndarray]) -> list[Any]:
        logits = outputs["logits"][:, 0].astype(np.float64)
        require_finite({"logits": logits})
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        shares = weights / weights.sum(-1, keepdims=True)
        return [
            {
                "boundary_probability": outputs["boundary_prob"][row, 0].astype(float).tolist(),
                "boundary": outputs["boundary"][row, 0].tolist(),
                "next": [{"byte": int(byte), "probability": float(shares[row, byte])} for byte in best],
            }
            for row, best in enumerate(np.argsort(-shares, -1, kind="stable")[:, :LIKELIEST])
        ]

    def example(self) -> Any:
        return {"byte": 0x61}

    def schema(self) -> Schema:
        return record({"byte": whole(0, VOCABULARY - 1)})


def _byte(request: Any, row: int) -> int:
    if not (isinstance(request, dict) and request.keys() == {"byte"}):
        raise InputError(f'request {row}: expected {{"byte": 0..255}}, found {ascii(request)[:60]}')
    byte = request["byte"]
    if type(byte) is not int or not 0 <= byte < VOCABULARY:
        raise InputError(f"request {row}, byte: expected a whole number from 0 to 255, found {ascii(byte)[:60]}")
    return byte
