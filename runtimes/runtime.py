"""Runtime: one way to open, run and close a converted model, whatever engine runs it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np

from runtimes import plugins
from runtimes.artifact import Artifact
from runtimes.errors import EngineError, InputError
from runtimes.host.gpu import DEVICES
from runtimes.tensors import BATCH, Signature, Tensors

Opened = TypeVar("Opened", bound="Runtime")


class Runtime(ABC):
    """A context manager that runs one artifact. `run` checks everything; an engine writes open, infer and close.

    `device` is "cpu" or "cuda"; `threads` bounds the threads of one call.

    devices      what the engine can run on at all
    remote       whether the model runs in another process that serves many; then it may be called from many threads
    environment  the virtual environment whose interpreter has what the engine needs, if it is not the project's
    served_by    the engine that runs the same artifact on a Triton server; empty where Triton has no backend for it
    """

    engine: str
    devices: ClassVar[tuple[str, ...]] = DEVICES
    remote: ClassVar[bool] = False
    environment: ClassVar[str] = ""
    served_by: ClassVar[str] = ""

    def __init__(self, root: Path, artifact: Artifact, *, device: str = "cpu", threads: int = 1) -> None:
        self.root = root
        self.artifact = artifact
        self.signature = artifact.signature
        self.device = device
        self.threads = threads

    @abstractmethod
    def open(self) -> None:
        """Load the artifact; `EngineError` if this machine cannot run it on `device`."""

    @abstractmethod
    def infer(self, inputs: Mapping[str, np.ndarray]) -> Tensors:
        """Outputs by name for inputs that were checked already."""

    def close(self) -> None:
        """Free what `open` took. Closing twice is allowed."""

    def refuse_device(self, cuda: bool = True) -> None:
        """`EngineError` if the engine does not run on `device`; `cuda` says whether it can use a GPU here."""
        allowed = [each for each in self.devices if cuda or each != "cuda"]
        if self.device not in allowed:
            raise EngineError(
                f"engine {self.engine}: expected a device of {', '.join(allowed)} here, found '{self.device}'"
            )

    @property
    @abstractmethod
    def provider(self) -> str:
        """What really runs the model, as the engine reports it."""

    @property
    def cuda_stream(self) -> int | None:
        """The CUDA stream that an open engine gives its work to, or None: there is none, or it does not show it."""
        return None

    def run(self, inputs: Mapping[str, np.ndarray]) -> Tensors:
        """Outputs by name; `InputError` if a feed is wrong, `ArtifactError` if the engine breaks the signature."""
        sizes = self.signature.check_inputs(inputs)
        outputs = self.infer(inputs)
        self.signature.check_outputs(outputs, sizes)
        return outputs

    def stream(self, batch: int = 1) -> "Stream":
        """A stream of `batch` rows whose recurrent state is kept between steps, zero at first."""
        return self.carried(batch)

    def carried(self, batch: int) -> "CarriedStream":
        """A stream whose state lies in this process, so that its rows may come and go."""
        return CarriedStream(self, batch)

    def fresh(self, inputs: Mapping[str, np.ndarray]) -> Tensors:
        """Outputs for inputs without state, with the state at zero."""
        name = self.signature.free_inputs[0].name
        if name not in inputs:
            raise InputError(f"expected input '{name}', found {', '.join(sorted(inputs)) or 'none'}")
        shape = getattr(inputs[name], "shape", ())
        if not shape:
            raise InputError(f"input '{name}': expected an array with rows, found {type(inputs[name]).__name__}")
        return self.run({**inputs, **self.signature.zero_state(shape[0])})

    def repeated(self, inputs: Mapping[str, np.ndarray]) -> Callable[[], Tensors]:
        """A call that answers as `fresh(inputs)` does, each time it is called; what stays may be done once.

        `inputs` stay as they are as long as it is in use.
        """
        return lambda: self.fresh(inputs)

    def __enter__(self: Opened) -> Opened:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Stream(ABC):
    """Rows that go on where their last step ended."""

    @abstractmethod
    def step(self, inputs: Mapping[str, np.ndarray]) -> Tensors:
        """Visible outputs for the next piece of every row; `inputs` has no state."""

    @abstractmethod
    def reset(self, rows: Iterable[int]) -> None:
        """Let these rows start anew at the next step."""

    def close(self) -> None:
        """Forget the state. Closing twice is allowed."""


class CarriedStream(Stream):
    """A stream whose state lies in this process. What the engine made itself is not checked again at every step."""

    def __init__(self, runtime: Runtime, batch: int) -> None:
        self.runtime = runtime
        self.batch = batch
        self.state = runtime.signature.zero_state(batch)
        whole = runtime.signature
        self.visible = Signature(inputs=whole.free_inputs, outputs=whole.visible_outputs, axes=whole.axes)

    def step(self, inputs: Mapping[str, np.ndarray]) -> Tensors:
        sizes = self.check(inputs)
        outputs = self.runtime.infer({**inputs, **self.state})
        self.state = {source: outputs.pop(result) for source, result in self.runtime.signature.state}
        self.visible.check_outputs(outputs, sizes)
        return outputs

    def reset(self, rows: Iterable[int]) -> None:
        chosen = list(rows)
        # An engine may hand out read-only arrays, so the state is copied before it is written.
        self.state = {name: array.copy() for name, array in self.state.items()}
        for array in self.state.values():
            array[chosen] = 0

    def choose(self, rows: Sequence[int | None]) -> None:
        """Go on with these rows, by their numbers until now, and with a new one for each None."""
        kept = [(place, row) for place, row in enumerate(rows) if row is not None]
        before, self.state = self.state, self.runtime.signature.zero_state(len(rows))
        self.batch = len(rows)
        if kept:
            places, old = map(list, zip(*kept, strict=True))
            for name, array in self.state.items():
                array[places] = before[name][old]

    def check(self, inputs: Mapping[str, np.ndarray]) -> dict[str, int]:
        """The size of every axis; `InputError` unless `inputs` is a right next piece of every row."""
        sizes = self.visible.check_inputs(inputs)
        if sizes[BATCH] != self.batch:
            raise InputError(f"expected {self.batch} rows as in every step, found {sizes[BATCH]}")
        return sizes


def open_runtime(root: Path | str, *, engine: str | None = None, verify: bool = True, **options: Any) -> Runtime:
    """A runtime, not yet entered, for the artifact in folder `root`; its files are verified first.

    `engine` overrides the artifact's own (`triton` runs it on a server); `options` go to the engine.
    """
    root = Path(root)
    artifact = Artifact.load(root)
    if verify:
        artifact.verify_files(root)
    runtime_class = plugins.load("runtimes.engines", engine or artifact.runtime, "RUNTIME")
    return runtime_class(root, artifact, **options)


def serving_engine(artifact: Artifact) -> str:
    """The engine that runs an artifact on a Triton server; `InputError` where Triton cannot serve it."""
    engine: str = plugins.load("runtimes.engines", artifact.runtime, "RUNTIME").served_by
    if not engine:
        raise InputError(
            f"expected an artifact that Triton serves, found {artifact.name} of engine {artifact.runtime}; "
            "export another target"
        )
    return engine


def device_for(engine: str, wanted: str) -> str:
    """The device that an engine is measured on where others are on `wanted`: that one, or the only one it has."""
    devices: tuple[str, ...] = plugins.load("runtimes.engines", engine, "RUNTIME").devices
    return devices[0] if len(devices) == 1 else wanted
