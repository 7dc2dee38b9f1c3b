"""A Triton backend in Python, copied under the name of each real one that a core lacks: onnxruntime, openvino.

It serves an unmodified folder of such a backend with our own engine of that name. A wrong request is refused alone, and
the others of its batch are answered. The Python backend of Triton 2.51 does not accumulate implicit state (it hands out
the initial one at every step), so the state of the sequences is kept here.
"""

import json
import os
import sys
from collections import defaultdict
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

from runtimes.errors import SlipwayError
from runtimes.runtime import device_for, open_runtime
from runtimes.tensors import BATCH, Tensors
from runtimes.triton.sequence_state import SequenceMemory

DEVICES = {"CPU": "cpu", "GPU": "cuda"}
DEFAULT_IDLE_US = 1_000_000  # Triton's own, when the config names none


class TritonPythonModel:
    """One instance of one version of one model."""

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        threads = config["parameters"].get("intra_op_thread_count", {}).get("string_value", "1")
        folder = Path(args["model_repository"], args["model_version"])
        try:
            device = device_for(config["backend"], DEVICES[args["model_instance_kind"]])
            self.runtime = open_runtime(folder, engine=config["backend"], device=device, threads=int(threads))
            self.runtime.open()
        except SlipwayError as error:
            raise pb_utils.TritonModelException(str(error)) from error
        self.signature = self.runtime.signature
        sequences = config.get("sequence_batching", {})
        idle_us = int(sequences.get("max_sequence_idle_microseconds") or DEFAULT_IDLE_US)
        self.memory = SequenceMemory(self.signature, idle_us / 1e6)

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response per request; those of one shape are run together."""
        self.memory.evict()
        responses: dict[int, Any] = {}
        groups = defaultdict(list)
        for index, request in enumerate(requests):
            try:
                inputs = self._inputs(request)
                sizes = self.signature.check_inputs(inputs)
            except SlipwayError as error:
                responses[index] = refusal(error, pb_utils.TritonError.INVALID_ARG)
            else:
                sizes.pop(BATCH)
                groups[tuple(sizes.values())].append((index, request, inputs))
        for group in groups.values():
            try:
                responses |= self._answer(group)
            except SlipwayError as error:
                responses |= {index: refusal(error, pb_utils.TritonError.INTERNAL) for index, _, _ in group}
        for request in requests:
            if request.flags() & pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_END:
                self.memory.end(request.correlation_id())
        return [responses[index] for index in range(len(requests))]

    def finalize(self) -> None:
        self.runtime.close()

    def _inputs(self, request: Any) -> Tensors:
        """The tensors of a request, and the state of its sequence."""
        names = [tensor.name for tensor in self.signature.free_inputs]
        inputs = {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in names}
        if not self.signature.state:
            return inputs
        if request.flags() & pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START:
            self.memory.begin(request.correlation_id())
        return inputs | self.memory.state(request.correlation_id())

    def _answer(self, group: list[tuple[int, Any, Tensors]]) -> dict[int, Any]:
        """Responses by index for requests whose tensors differ in nothing but their rows."""
        inputs = [inputs for _, _, inputs in group]
        outputs = self.runtime.run({name: np.concatenate([each[name] for each in inputs]) for name in inputs[0]})
        responses = {}
        for (index, request, _), answer in zip(group, split(outputs, [rows(each) for each in inputs]), strict=True):
            if self.signature.state:
                # Copies, or one sequence would keep the state of its whole batch in memory.
                state = {source: answer.pop(result).copy() for source, result in self.signature.state}
                self.memory.keep(request.correlation_id(), state)
            responses[index] = pb_utils.InferenceResponse([pb_utils.Tensor(*named) for named in answer.items()])
        return responses


def rows(tensors: Tensors) -> int:
    return len(next(iter(tensors.values())))


def split(outputs: Tensors, sizes: list[int]) -> list[Tensors]:
    """The outputs of a batch as those of its requests, which have `sizes` rows each."""
    cuts = np.cumsum(sizes)[:-1]
    pieces = [np.split(array, cuts) for array in outputs.values()]
    return [dict(zip(outputs, arrays, strict=True)) for arrays in zip(*pieces, strict=True)]


def refusal(error: SlipwayError, code: int) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), code))
