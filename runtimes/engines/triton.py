"""A model on a Triton server over gRPC or HTTP, as a client of the deployment uses it."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.artifact import Artifact
from runtimes.errors import EngineError, InputError, SlipwayError
from runtimes.runtime import Stream
from runtimes.tensors import Signature, Tensors, TensorSpec
from runtimes.triton.client import Answer, new_sequence
from runtimes.triton.remote import RemoteModel

TYPES = {"float32": "FP32", "float16": "FP16", "int64": "INT64", "int32": "INT32", "uint8": "UINT8", "bool": "BOOL"}


class TritonRuntime(RemoteModel):
    """Runs requests on the server at `url` ("host:port"), which keeps a recurrent state: no tensor here carries it.

    `signature` is the artifact's without state. For a recurrent model `run` makes every row a sequence of one request,
    which starts from zero, and `stream` makes every row a sequence of its own.
    """

    engine = "triton"

    def __init__(self, root: Path, artifact: Artifact, **options: Any) -> None:
        super().__init__(root, artifact, **options)
        self.recurrent = bool(artifact.signature.state)
        self.signature = Signature(
            inputs=artifact.signature.free_inputs,
            outputs=artifact.signature.visible_outputs,
            axes=artifact.signature.axes,
        )

    def check_metadata(self, metadata: Mapping[str, Any]) -> None:
        for kind in ("inputs", "outputs"):
            expected = {spec.name: described(spec) for spec in getattr(self.signature, kind)}
            found = {each["name"]: (each["datatype"], *map(int, each["shape"])) for each in metadata[kind]}
            if expected != found:
                raise EngineError(
                    f"{self.model} at {self.url}: expected {kind} {expected}, found {found}; "
                    "publish the artifact there, or name its model"
                )

    def run(self, inputs: Mapping[str, np.ndarray]) -> Tensors:
        given = {source for source, _ in self.artifact.signature.state} & inputs.keys()
        if any(inputs[name].any() for name in given):
            raise InputError(
                f"expected {', '.join(sorted(given))} to be zero or left out: the server keeps the state; use stream"
            )
        return super().run({name: array for name, array in inputs.items() if name not in given})

    def infer(self, inputs: Mapping[str, np.ndarray]) -> Tensors:
        if not self.recurrent:
            return self.send(inputs, alone=True)()
        whole = {"sequence_start": True, "sequence_end": True}
        separate = list(rows(inputs))
        alone = len(separate) == 1
        return joined([self.send(row, alone=alone, sequence_id=new_sequence(), **whole) for row in separate])

    def repeated(self, inputs: Mapping[str, np.ndarray]) -> Callable[[], Tensors]:
        """As in the base class; a request that starts no sequence is checked and built once.

        Answers are not compared with the signature: `open` has compared it with the server's.
        """
        if self.recurrent:
            return super().repeated(inputs)
        self.signature.check_inputs(inputs)
        return self.send(inputs, alone=True)

    def stream(self, batch: int = 1) -> Stream:
        return SequenceStream(self, batch) if self.recurrent else super().stream(batch)

    def send(self, inputs: Mapping[str, np.ndarray], *, alone: bool = False, **sequence: Any) -> Answer:
        """A call that waits for the visible outputs of a sent request, or sends it if it is `alone`."""
        # One number per row is sent as [batch, 1]: Triton has no tensor without dims.
        wide = {name: array[:, None] if array.ndim == 1 else array for name, array in inputs.items()}
        specs = self.signature.outputs
        wait = self.client.send(self.model, wide, [spec.name for spec in specs], alone=alone, **sequence)

        def answer() -> Tensors:
            outputs = wait()
            return {spec.name: narrowed(outputs[spec.name], spec) for spec in specs}

        return answer


class SequenceStream(Stream):
    """A stream whose state is kept by the server, one sequence per row."""

    def __init__(self, runtime: TritonRuntime, batch: int) -> None:
        self.runtime = runtime
        self.sequences = [new_sequence() for _ in range(batch)]
        self.starting = set(self.sequences)
        self.last: Mapping[str, np.ndarray] = {}

    def step(self, inputs: Mapping[str, np.ndarray]) -> Tensors:
        signature = self.runtime.signature
        sizes = signature.check_inputs(inputs)
        if sizes["batch"] != len(self.sequences):
            raise InputError(f"expected {len(self.sequences)} rows as in every step, found {sizes['batch']}")
        outputs = self._send(inputs)
        signature.check_outputs(outputs, sizes)
        self.starting.clear()
        self.last = inputs
        return outputs

    def reset(self, rows: Iterable[int]) -> None:
        self.starting.update(self.sequences[row] for row in rows)

    def close(self) -> None:
        # Only a request can end a sequence, so the last one is sent again. A dropped sequence has ended.
        with suppress(SlipwayError):
            if self.last:
                self._send(self.last, sequence_end=True)
        self.last = {}

    def _send(self, inputs: Mapping[str, np.ndarray], **sequence: Any) -> Tensors:
        alone = len(self.sequences) == 1
        return joined(
            [
                self.runtime.send(row, alone=alone, sequence_id=own, sequence_start=own in self.starting, **sequence)
                for own, row in zip(self.sequences, rows(inputs), strict=True)
            ]
        )


def rows(inputs: Mapping[str, np.ndarray]) -> Iterator[Tensors]:
    """The rows of a batch, each a batch of one."""
    for row in range(len(next(iter(inputs.values())))):
        yield {name: array[row : row + 1] for name, array in inputs.items()}


def joined(answers: Sequence[Answer]) -> Tensors:
    """The answers of rows that were sent, as one batch."""
    arrived = [answer() for answer in answers]
    return {name: np.concatenate([row[name] for row in arrived]) for name in arrived[0]}


def narrowed(array: np.ndarray, spec: TensorSpec) -> np.ndarray:
    """A number per row as in the signature, [batch]; it was sent as [batch, 1]."""
    return array[:, 0] if len(spec.shape) == 1 else array


def described(spec: TensorSpec) -> tuple[str | int, ...]:
    """The datatype and shape of a tensor in Triton's metadata."""
    dims = [size if isinstance(size, int) else -1 for size in spec.shape[1:]] or [1]
    return (TYPES[spec.dtype], -1, *dims)


RUNTIME = TritonRuntime
