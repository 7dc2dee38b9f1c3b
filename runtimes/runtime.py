"""Runtime: one way to open, run and close a converted model, with any engine."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np

from runtimes import plugins
from runtimes.artifact import Artifact
from runtimes.errors import EngineError, InputError
from runtimes.host.gpu import DEVICES
from runtimes.tensors import BATCH, Signature, Tensors

Opened = TypeVar("Opened", bound="Runtime")


@dataclass(frozen=True, kw_only=True, slots=True)
class Backend:
    """Triton's backend of an engine's name, as far as the start of a server depends on it.

    proxy             folder in runtimes/triton/backends that replaces it where the server has no such backend
    completes_config  whether it adds the inputs and outputs to config.pbtxt itself
    start_timeout_s   how long the server may take to get ready with a model of it, exit_timeout_s to stop
    """

    proxy: str
    completes_config: bool = False
    start_timeout_s: float = 60.0
    exit_timeout_s: int = 5  # Triton's default of 30 s is the wait for a stub that hangs


class Runtime(ABC):
    """A context manager that runs one artifact. `run` checks everything; an engine implements open, infer and close.

    `device` is "cpu" or "cuda"; `threads` bounds the threads of one call.

    devices      the devices that the engine supports
    remote       whether the model runs in another process, which many threads may call at once
    environment  the virtual environment whose interpreter has the engine's packages, if it is not the project's
    served_by    the engine that runs the same artifact on a Triton server; empty where Triton has no backend for it
    backend      that backend of Triton, if it can be replaced by this engine itself
    """

    engine: str
    devices: ClassVar[tuple[str, ...]] = DEVICES
    remote: ClassVar[bool] = False
    environment: ClassVar[str] = ""
    served_by: ClassVar[str] = ""
    backend: ClassVar[Backend | None] = None

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
        """Outputs by name for inputs that are checked already."""

    def close(self) -> None:
        """Free what `open` allocated. Closing twice is allowed."""

    def refuse_device(self, cuda: bool = True) -> None:
        """`EngineError` if the engine does not run on `device`; `cuda`: whether it can use a GPU here."""
        allowed = [each for each in self.devices if cuda or each != "cuda"]
        if self.device not in allowed:
            raise EngineError(
                f"engine {self.engine}: expected a device of {', '.join(allowed)} here, found '{self.device}'"
            )

    @property
    @abstractmethod
    def provider(self) -> str:
        """The provider or device that runs the model, as the engine reports it."""

    @property
    def cuda_stream(self) -> int | None:
        """The CUDA stream of an open engine, or None where there is none or the engine does not expose it."""
        return None

    def run(self, inputs: Mapping[str, np.ndarray]) -> Tensors:
        """Outputs by name; `InputError` for a wrong input, `ArtifactError` if the engine breaks the signature."""
        sizes = self.signature.check_inputs(inputs)
        outputs = self.infer(inputs)
        self.signature.check_outputs(outputs, sizes)
        return outputs

    def stream(self, batch: int = 1) -> "Stream":
        """A stream of `batch` rows whose recurrent state is kept between steps, zero at first."""
        return self.carried(batch)

    def carried(self, batch: int) -> "CarriedStream":
        """A stream whose state is in this process, so that rows can be added and removed."""
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
        """A call that returns `fresh(inputs)` each time; an engine may do work that does not change only once.

        `inputs` must not change while the call is in use.
        """
        return lambda: self.fresh(inputs)

    def __enter__(self: Opened) -> Opened:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Stream(ABC):
    """Rows whose recurrent state is kept from step to step."""

    @abstractmethod
    def step(self, inputs: Mapping[str, np.ndarray]) -> Tensors:
        """Visible outputs for the next piece of every row; `inputs` has no state."""

    @abstractmethod
    def reset(self, rows: Iterable[int]) -> None:
        """These rows start with a state of zero at the next step."""

    def close(self) -> None:
        """Forget the state. Closing twice is allowed."""


class CarriedStream(Stream):
    """A stream whose state is in this process. State that the engine returned is not checked again."""

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
        """Continue with these rows, by their numbers so far, and with a new one for each None."""
        kept = [(place, row) for place, row in enumerate(rows) if row is not None]
        before, self.state = self.state, self.runtime.signature.zero_state(len(rows))
        self.batch = len(rows)
        if kept:
            places, old = map(list, zip(*kept, strict=True))
            for name, array in self.state.items():
                array[places] = before[name][old]

    def check(self, inputs: Mapping[str, np.ndarray]) -> dict[str, int]:
        """The size of every axis; `InputError` unless `inputs` is a valid next piece of every row."""
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
    """`wanted`, or the only device of an engine that has one."""
    devices: tuple[str, ...] = plugins.load("runtimes.engines", engine, "RUNTIME").devices
    return devices[0] if len(devices) == 1 else wanted
