"""A step of an ensemble, in Triton's Python backend: a JSON request becomes tensors, or tensors become a JSON answer.

Export copies this file beside the manifest and the files of the artifact it was made for; the config's parameter `step`
selects the step.
"""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

# Triton's embedded interpreter ignores PYTHONPATH. The path is removed again at once: other packages on it, such as
# another numpy, are not for this environment.
if source := os.environ.get("SLIPWAY_PATH"):
    sys.path.insert(0, source)
    import runtimes  # noqa: F401

    sys.path.remove(source)

from runtimes.artifact import Artifact, verify_digests
from runtimes.errors import SlipwayError
from runtimes.pipeline import open_pipeline, parse_request, write_answer
from runtimes.tensors import Tensors


class TritonPythonModel:
    """Half of the pipeline of one model. Requests are handled separately, so that a wrong one fails alone."""

    def initialize(self, args: dict[str, str]) -> None:
        folder = Path(args["model_repository"], args["model_version"])
        step = json.loads(args["model_config"])["parameters"]["step"]["string_value"]
        try:
            artifact = Artifact.load(folder)
            verify_digests(folder, artifact.assets)
            self.pipeline = open_pipeline(artifact, folder)
        except SlipwayError as error:
            raise pb_utils.TritonModelException(str(error)) from error
        self.signature = artifact.signature
        self.act = {"encode": self.encode, "decode": self.decode}[step]

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response per request."""
        return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> Any:
        try:
            tensors = self.act({tensor.name(): tensor.as_numpy() for tensor in request.inputs()})
        except SlipwayError as error:
            code = getattr(pb_utils.TritonError, error.triton_code)
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), code))
        return pb_utils.InferenceResponse([pb_utils.Tensor(*named) for named in tensors.items()])

    def encode(self, given: Mapping[str, np.ndarray]) -> Tensors:
        """Checked tensors for `request`, bytes [batch, 1]; `InputError` for a wrong request."""
        requests = [parse_request(text, f"request {row}") for row, text in enumerate(given["request"].ravel())]
        inputs = self.pipeline.encode(requests)
        self.signature.check_inputs({**inputs, **self.signature.zero_state(len(requests))})
        return inputs

    def decode(self, given: Mapping[str, np.ndarray]) -> Tensors:
        """`answer`, bytes [batch, 1], for the visible outputs; `EngineError` for an answer with NaN in it."""
        answers = [write_answer(answer) for answer in self.pipeline.decode(given)]
        return {"answer": np.array(answers, dtype=np.object_).reshape(-1, 1)}
