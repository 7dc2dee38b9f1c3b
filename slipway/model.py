"""A published artifact that is open in this process."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.artifact import Artifact, artifact_name
from runtimes.errors import InputError
from runtimes.host.gpu import DEVICES
from runtimes.pipeline import Pipeline, open_pipeline, refuse_no_requests, write_answer
from runtimes.repository import find
from runtimes.runtime import Runtime, Stream, open_runtime
from runtimes.tensors import Signature, Tensors


def load(
    model: str,
    *,
    repository: str | Path = "model_repository",
    target: str = "onnx",
    precision: str = "fp32",
    device: str = "cpu",
    threads: int = 1,
    verify: bool = True,
) -> "Model":
    """The newest version of a published artifact, open and ready to run; close it, or use it in a `with` block.

    Args:
        model: name of the model, such as `policy_gru`.
        repository: model repository that `slipway export` published into.
        target: target of the artifact, such as `onnx`, `openvino` or `torch`.
        precision: precision of the artifact, such as `fp32`, `fp16` or `int8`.
        device: `cpu` or `cuda`.
        threads: threads that one call uses at most.
        verify: compare the files of the artifact with the digests in its manifest first.

    Raises:
        InputError: the artifact is not published, or an argument is wrong.
        ArtifactError: the artifact's files differ from its manifest.
        EngineError: this machine cannot run the artifact on `device`.
        MissingPackage: the engine's package is not installed; the text names the extra.
    """
    if device not in DEVICES:
        raise InputError(f"device: expected one of {', '.join(DEVICES)}, found {device!r}")
    if not isinstance(threads, int) or threads < 1:
        raise InputError(f"threads: expected an integer of 1 or more, found {threads!r}")
    root = find(Path(repository), artifact_name(model, target, precision))
    runtime = open_runtime(root, verify=verify, device=device, threads=threads)
    opened = Model(runtime, open_pipeline(runtime.artifact, root))
    runtime.open()
    return opened


class Model:
    """An open artifact with its pipeline: requests to answers with `predict`, arrays to arrays with `run`.

    One call at a time. `load` makes it.
    """

    def __init__(self, runtime: Runtime, pipeline: Pipeline) -> None:
        self._runtime = runtime
        self._pipeline = pipeline
        self._closed = False

    @property
    def artifact(self) -> Artifact:
        """The manifest: model, target, precision, config, digests, parity."""
        return self._runtime.artifact

    @property
    def signature(self) -> Signature:
        """Inputs, outputs and axes with their bounds."""
        return self._runtime.signature

    def predict(self, request: Any) -> Any:
        """The answer to one request, or the list of answers to a list of requests, which run as one batch.

        Requests and answers are JSON values: dicts, lists, strings and numbers. An answer is the same as that of
        `slipway predict` for the same request: its numbers are rounded to float32. A recurrent model starts from zero.

        Raises:
            InputError: a request does not fit the model's schema, or there are more than axis `batch` allows.
        """
        requests = request if isinstance(request, list) else [request]
        refuse_no_requests(requests)
        answers = [json.loads(write_answer(each)) for each in self._pipeline.respond(self._open(), requests)]
        return answers if isinstance(request, list) else answers[0]

    def run(self, inputs: Mapping[str, np.ndarray]) -> Tensors:
        """The outputs by name for inputs by name, each array with the dtype and shape that `signature` states.

        A recurrent state that is not among the inputs is zero; the outputs contain the new one.

        Raises:
            InputError: a name, dtype, shape or value (NaN, infinity) is wrong.
            ArtifactError: the engine returned other tensors than the signature states.
        """
        runtime = self._open()
        carried = {source for source, _ in self.signature.state}
        return runtime.fresh(inputs) if carried and not carried & inputs.keys() else runtime.run(inputs)

    def stream(self, batch: int = 1) -> Stream:
        """`batch` sequences of a recurrent model, whose state is kept between calls of `step` and is zero at first.

        `step` takes the inputs without the state, and returns the outputs without it; `reset` starts rows anew.

        Raises:
            InputError: the model has no recurrent state, or `batch` is outside the bounds of axis `batch`.
        """
        runtime = self._open()
        if not self.signature.state:
            raise InputError(f"expected a recurrent model, found {self.artifact.name}, which has no state; use run")
        axis = self.signature.axis("batch")
        if not axis.min <= batch <= axis.max:
            raise InputError(f"batch: expected {axis.min}..{axis.max}, found {batch}")
        return runtime.stream(batch)

    def example(self) -> Any:
        """A valid request."""
        return self._pipeline.example()

    def schema(self) -> dict[str, Any]:
        """The JSON Schema (2020-12) that every valid request satisfies."""
        return dict(self._pipeline.schema())

    def close(self) -> None:
        """Free the engine. Closing twice is allowed; a call after it raises `InputError`."""
        self._closed = True
        self._runtime.close()

    def __enter__(self) -> "Model":
        self._open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<slipway.Model {self.artifact.name}{' (closed)' if self._closed else ''}>"

    def _open(self) -> Runtime:
        if self._closed:
            raise InputError(f"expected an open model, found {self.artifact.name} closed; load it again")
        return self._runtime
