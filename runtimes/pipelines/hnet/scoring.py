"""H-Net: a text in; the bits of each of its bytes, and the beginnings of its segments, out."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from runtimes.pipeline import TEXT, Pipeline, Schema, array, record, refuse_no_requests, whole
from runtimes.pipelines.hnet.byte_text import VOCABULARY, padded_rows, read_request, segments
from runtimes.tensors import Tensors, require_finite

BYTES_MAX = 1023  # of a text: the longest row the model is verified for, less the byte that begins it


class HNetPipeline(Pipeline):
    """A request is `{"text": ...}` or `{"bytes": [...]}`.

    An answer has `bits_per_byte`, the `bits` of every byte given those before it, and for every stage the `segments`
    with their bits and the probability that one begins there. A segment starts at the byte that begins it.
    """

    def encode(self, requests: Sequence[Any]) -> Tensors:
        """`byte_ids` int64 [batch, time] and `lengths` int64 [batch]; the byte that begins a text is counted."""
        refuse_no_requests(requests)
        ids, lengths = padded_rows([read_request(request, i, BYTES_MAX) for i, request in enumerate(requests)])
        return {"byte_ids": ids, "lengths": lengths}

    def decode(self, outputs: Mapping[str, np.ndarray]) -> list[Any]:
        require_finite({name: outputs[name] for name in ("nats", "boundary_prob")})
        return [
            _answer(ids[ids >= 0][1:], nats, likely, begins)
            for ids, nats, likely, begins in zip(
                outputs["text_bytes"], outputs["nats"], outputs["boundary_prob"], outputs["boundary"], strict=True
            )
        ]

    def example(self) -> Any:
        return {"text": "తెలుగు ఒక ద్రావిడ భాష."}

    def schema(self) -> Schema:
        return {
            "oneOf": [
                record({"text": TEXT}),
                record({"bytes": array(whole(0, VOCABULARY - 1), 1, BYTES_MAX)}),
            ]
        }


def _answer(ids: np.ndarray, nats: np.ndarray, likely: np.ndarray, begins: np.ndarray) -> Any:
    """The answer for one text, whose rows begin one place before it."""
    text, end = ids.astype(np.uint8).tobytes(), len(ids) + 1
    bits = nats[1:end].astype(np.float64) / np.log(2)
    return {
        "bits_per_byte": float(bits.mean()),
        "bits": bits.tolist(),
        "segments": [
            _scored(text, begins[1:end, stage], likely[1:end, stage], bits) for stage in range(begins.shape[1])
        ],
    }


def _scored(text: bytes, begins: np.ndarray, likely: np.ndarray, bits: np.ndarray) -> list[dict[str, Any]]:
    return [
        {
            **segment,
            "bits": float(bits[segment["begin"] : segment["end"]].sum()),
            "boundary_probability": float(likely[segment["begin"]]),
        }
        for segment in segments(text, begins)
    ]
