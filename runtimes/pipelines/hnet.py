"""H-Net: a text in, where its segments begin out."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from runtimes.bytetext import padded_rows, read_request
from runtimes.errors import InputError
from runtimes.pipeline import Pipeline
from runtimes.tensors import Tensors

BYTES_MAX = 1023  # of a text: the longest row the model is proved for, less BOS


class HNetPipeline(Pipeline):
    """A request is `{"text": ...}` or `{"bytes": [...]}`; the answer has the bytes at which segments begin."""

    def encode(self, requests: Sequence[Any]) -> Tensors:
        if not requests:
            raise InputError("expected at least one request, found none")
        ids, lengths = padded_rows([read_request(request, i, BYTES_MAX) for i, request in enumerate(requests)])
        return {"byte_ids": ids, "lengths": lengths}

    def decode(self, outputs: Mapping[str, np.ndarray]) -> list[Any]:
        return [{"begins": np.flatnonzero(row[1:, 0]).tolist()} for row in outputs["boundary"]]

    def example(self) -> Any:
        return {"text": "తెలుగు ఒక ద్రావిడ భాష."}


PIPELINE = HNetPipeline
