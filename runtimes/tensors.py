"""Axis, TensorSpec, Signature: the inputs and outputs of a model, declared once and checked once."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from runtimes.errors import ArtifactError, EngineError, InputError

BATCH = "batch"  # the first axis of every tensor
DTYPES = ("float32", "float16", "int64", "int32", "uint8", "bool")
NUMPY_DTYPES = {name: np.dtype(name) for name in DTYPES}  # dtype.name costs a microsecond a call, and steps are short

Bound = Literal["min", "opt", "max"]
Tensors = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """A dynamic axis: the sizes a model is verified for, and the one it is tuned for."""

    name: str
    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        # torch.export freezes an axis traced at size 1, hence opt >= 2.
        if not (1 <= self.min <= self.opt <= self.max and self.opt >= 2):
            raise ArtifactError(
                f"axis '{self.name}': expected 1 <= min <= opt <= max and opt >= 2, "
                f"found {self.min}, {self.opt}, {self.max}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """A tensor's name, dtype and shape; a string in the shape names an Axis."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ArtifactError(f"tensor '{self.name}': expected a dtype of {', '.join(DTYPES)}, found '{self.dtype}'")
        if not self.shape or self.shape[0] != BATCH:
            raise ArtifactError(f"tensor '{self.name}': expected '{BATCH}' as first axis, found shape {self.shape}")

    def resolve(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with every axis at its size."""
        return tuple(sizes[size] if isinstance(size, str) else size for size in self.shape)

    def zeros(self, sizes: Mapping[str, int]) -> np.ndarray:
        return np.zeros(self.resolve(sizes), self.dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class Signature:
    """Inputs, outputs and axes of a model, and the pairs (input, output) that carry a recurrent state.

    `in_place` names the inputs of those pairs that may share the memory of their output: the model reads nothing there
    once it has written there. An engine that shares the memory need not copy what does not change, such as a ring.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    axes: tuple[Axis, ...]
    state: tuple[tuple[str, str], ...] = ()
    in_place: tuple[str, ...] = ()
    _axes: dict[str, Axis] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_axes", {axis.name: axis for axis in self.axes})
        names = [tensor.name for tensor in (*self.inputs, *self.outputs)]
        if len(names) != len(set(names)):
            raise ArtifactError(f"expected distinct tensor names, found {sorted(names)}")
        used = {size for tensor in (*self.inputs, *self.outputs) for size in tensor.shape if isinstance(size, str)}
        declared = sorted(axis.name for axis in self.axes)
        if sorted(used) != declared:
            raise ArtifactError(f"expected axes {sorted(used)} as the shapes use them, found {declared}")
        inputs = {tensor.name: (tensor.dtype, tensor.shape) for tensor in self.inputs}
        outputs = {tensor.name: (tensor.dtype, tensor.shape) for tensor in self.outputs}
        for source, result in self.state:
            kind = inputs.get(source)
            if kind is None or kind != outputs.get(result) or not used.intersection(kind[1]) <= {BATCH}:
                raise ArtifactError(
                    f"state '{source}' -> '{result}': expected an input and an output of one dtype and shape, "
                    f"with no dynamic axis but {BATCH}"
                )
        if stray := set(self.in_place) - {source for source, _ in self.state}:
            raise ArtifactError(f"in place: expected inputs that carry a state, found {', '.join(sorted(stray))}")

    def axis(self, name: str) -> Axis:
        return self._axes[name]

    def sizes(self, bound: Bound) -> dict[str, int]:
        """Every axis at its `min`, `opt` or `max`."""
        return {axis.name: getattr(axis, bound) for axis in self.axes}

    @property
    def free_inputs(self) -> tuple[TensorSpec, ...]:
        """The inputs a caller must give: all but the recurrent state."""
        carried = {source for source, _ in self.state}
        return tuple(tensor for tensor in self.inputs if tensor.name not in carried)

    @property
    def visible_outputs(self) -> tuple[TensorSpec, ...]:
        """The outputs of interest to a caller: all but the recurrent state."""
        carried = {result for _, result in self.state}
        return tuple(tensor for tensor in self.outputs if tensor.name not in carried)

    def zero_state(self, batch: int) -> Tensors:
        """The state of `batch` rows that have seen nothing: zeros."""
        carried = {source for source, _ in self.state}
        return {tensor.name: tensor.zeros({BATCH: batch}) for tensor in self.inputs if tensor.name in carried}

    def check_inputs(self, inputs: Mapping[str, np.ndarray]) -> dict[str, int]:
        """The size of every axis in `inputs`; `InputError` unless names, dtypes, shapes and values are all right."""
        return self._check("input", self.inputs, inputs, {})

    def check_outputs(self, outputs: Mapping[str, np.ndarray], sizes: dict[str, int]) -> None:
        """`ArtifactError` if an engine returned other tensors than the signature promises for these sizes."""
        try:
            self._check("output", self.outputs, outputs, dict(sizes), finite=False)
        except InputError as error:
            raise ArtifactError(f"the engine broke the signature: {error}") from error

    def _check(
        self,
        kind: str,
        specs: tuple[TensorSpec, ...],
        arrays: Mapping[str, np.ndarray],
        sizes: dict[str, int],
        finite: bool = True,
    ) -> dict[str, int]:
        if arrays.keys() != {tensor.name for tensor in specs}:
            expected = ", ".join(tensor.name for tensor in specs)
            raise InputError(f"expected {kind}s {expected}; found {', '.join(sorted(arrays)) or 'none'}")
        for tensor in specs:
            array = arrays[tensor.name]
            self._check_shape(kind, tensor, array, sizes)
            if finite and not is_finite(array):
                raise InputError(f"{kind} '{tensor.name}': expected finite numbers, found NaN or infinity")
        return sizes

    def _check_shape(self, kind: str, tensor: TensorSpec, array: np.ndarray, sizes: dict[str, int]) -> None:
        if not isinstance(array, np.ndarray) or array.dtype != NUMPY_DTYPES[tensor.dtype]:
            found = getattr(array, "dtype", type(array).__name__)
            raise InputError(f"{kind} '{tensor.name}': expected dtype {tensor.dtype}, found {found}")
        if array.ndim != len(tensor.shape):
            raise InputError(
                f"{kind} '{tensor.name}': expected shape {_show(tensor.shape)}, found {_show(array.shape)}"
            )
        for want, got in zip(tensor.shape, array.shape, strict=True):
            if want == got:
                continue
            if isinstance(want, int):
                allowed = False
            elif want in sizes:
                allowed = got == sizes[want]
            else:
                axis = self._axes[want]
                allowed = axis.min <= got <= axis.max
                if allowed:
                    sizes[want] = got
            if not allowed:
                raise InputError(
                    f"{kind} '{tensor.name}': expected shape {_show(tensor.shape)} with "
                    f"{self._describe(tensor, sizes)}, found {_show(array.shape)}"
                )

    def _describe(self, tensor: TensorSpec, sizes: Mapping[str, int]) -> str:
        axes = [self._axes[size] for size in tensor.shape if isinstance(size, str)]
        return ", ".join(
            f"{axis.name} = {sizes[axis.name]}" if axis.name in sizes else f"{axis.name} {axis.min}..{axis.max}"
            for axis in axes
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "inputs": [asdict(tensor) for tensor in self.inputs],
            "outputs": [asdict(tensor) for tensor in self.outputs],
            "axes": [asdict(axis) for axis in self.axes],
            "state": [list(pair) for pair in self.state],
            "in_place": list(self.in_place),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Signature":
        def tensors(rows: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
            return tuple(TensorSpec(name=r["name"], dtype=r["dtype"], shape=tuple(r["shape"])) for r in rows)

        return cls(
            inputs=tensors(data["inputs"]),
            outputs=tensors(data["outputs"]),
            axes=tuple(Axis(**axis) for axis in data["axes"]),
            state=tuple((source, result) for source, result in data["state"]),
            in_place=tuple(data.get("in_place", ())),  # older manifests name none
        )


def is_finite(array: np.ndarray) -> bool:
    """False for an array that holds NaN or infinity; integers are always finite."""
    return array.dtype.kind != "f" or bool(np.isfinite(array).all())


def require_finite(arrays: Mapping[str, np.ndarray], remedy: str = "run: python -m export.verify") -> None:
    """`EngineError` that names the first output with NaN or infinity in it."""
    for name, array in arrays.items():
        if not is_finite(array):
            raise EngineError(f"output '{name}': expected finite numbers, found NaN or infinity; {remedy}")


def _show(shape: tuple[int | str, ...]) -> str:
    return f"[{', '.join(str(size) for size in shape)}]"
