"""One step of an H-Net: a byte in; whether a segment begins there, and the likeliest next bytes, out."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from runtimes.errors import InputError
from runtimes.pipeline import Schema, record, whole
from runtimes.pipelines.hnet.byte_text import VOCABULARY
from runtimes.pipelines.hnet.generation import DEFAULTS, SCHEMA, ContinuousBatcher, Writing, read_generation_request
from runtimes.pipelines.hnet.generation import EXAMPLE as GENERATION_EXAMPLE
from runtimes.runtime import Runtime
from runtimes.tensors import Tensors, require_finite
from runtimes.text_pipeline import BatchingPipeline, Option

LIKELIEST = 8


class HNetStepPipeline(BatchingPipeline):
    """A request is `{"byte": 0..255}`, the next of a text that begins with 254; the server keeps the state.

    An answer has p and decision of every stage, and the likeliest next bytes with their probabilities. Many such steps
    generate a text (`runtimes.generate`).
    """

    generation_target = "onnx"
    generation_schema = SCHEMA
    generation_options = (
        Option(name="text", kind=str, meaning="beginning of the text"),
        Option(name="max_bytes", kind=int, meaning="bytes to generate at most", default=DEFAULTS["max_bytes"]),
        Option(
            name="temperature", kind=float, meaning="0 is always the likeliest byte", default=DEFAULTS["temperature"]
        ),
        Option(
            name="top_k",
            kind=int,
            meaning="likeliest bytes to draw among; 0 is all",
            default=DEFAULTS["top_k"],
        ),
        Option(name="seed", kind=int, meaning="seed of the random numbers", default=DEFAULTS["seed"]),
    )
    generation_commands = (
        "hnet --text 'తెలుగు' --max-bytes 200 --temperature 0.8",
        "hnet --text 'తెలుగు' --url 127.0.0.1:8001 --json",
    )
    name_suffix, served_suffix = "_step", "_generate"

    @classmethod
    def generation_example(cls) -> Any:
        return GENERATION_EXAMPLE

    @classmethod
    def generation_request(cls, request: Any | None, options: Mapping[str, Any]) -> Any:
        if request is None and "text" not in options:
            raise InputError("expected --text TEXT or --input FILE, found neither; --example prints a request")
        complete = {**request, **options} if isinstance(request, dict) else options if request is None else request
        read_generation_request(complete, "request")
        return complete

    def begin(self, request: Any, where: str) -> Writing:
        return Writing(read_generation_request(request, where))

    def batcher(self, runtime: Runtime) -> ContinuousBatcher:
        return ContinuousBatcher(runtime)

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
