"""Source: a restored model, traced lazily and once in each form; every converted model is compared with it."""

import copy
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from export.calibration_texts import CalibrationTexts
from runtimes.tensors import Tensors
from training.checkpoint import Checkpoint, restore
from training.language_model import NotADecoder
from training.layers.form import Form, scan_form
from training.spec import ModelSpec

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram
    from torch.onnx import ONNXProgram

    from training.language_model import LanguageModel

OPERATOR = Form(kind="operator")


class Source:
    """The original: a checkpoint of a model, which can be run and traced."""

    def __init__(self, spec: ModelSpec, checkpoint: Checkpoint, texts: CalibrationTexts | None = None) -> None:
        self.spec = spec
        self.texts = texts or CalibrationTexts()
        self.checkpoint = checkpoint
        self.config = checkpoint.config
        self.signature = spec.interface.signature(checkpoint.config)
        self.onnx_programs: dict[ExportedProgram, ONNXProgram] = {}
        self._programs: dict[tuple[Any, ...], ExportedProgram] = {}

    @cached_property
    def module(self) -> "torch.nn.Module":
        """The module to export, in float32 without gradients: traces of trainable parameters fail in operators."""
        return self.spec.interface.wrap(restore(self.checkpoint, self.spec)).requires_grad_(False)

    @cached_property
    def sample_inputs(self) -> Tensors:
        return self.checkpoint.sample_inputs()

    @cached_property
    def language_model(self) -> "LanguageModel":
        """The decoder inside the module; `NotADecoder` if this checkpoint has none."""
        if self.spec.export.language_model is None:
            raise NotADecoder(f"{self.spec.name}: not a decoder language model")
        return self.spec.export.language_model(self.config, self.module, self.sample_inputs)

    def draw_inputs(self, rng: np.random.Generator, sizes: Mapping[str, int]) -> Tensors:
        """Realistic inputs of these sizes, without state."""
        return self.spec.parity.draw_inputs(self.config, rng, sizes, self.sample_inputs)

    def answer(self, inputs: Mapping[str, np.ndarray]) -> Tensors:
        """The outputs of eager torch for these inputs, state at zero; state outputs included."""
        import torch

        batch = len(inputs[self.signature.free_inputs[0].name])
        complete = {**inputs, **self.signature.zero_state(batch)}
        with torch.no_grad():
            outputs = self.module(*self._arguments(complete))
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        return {tensor.name: value.numpy() for tensor, value in zip(self.signature.outputs, outputs, strict=True)}

    def sequence(self, inputs: Mapping[str, np.ndarray]) -> Tensors:
        """The visible outputs of eager torch for whole sequences, state at zero."""
        import torch

        if self.spec.parity.sequence is None:
            answer = self.answer(inputs)
            return {tensor.name: answer[tensor.name] for tensor in self.signature.visible_outputs}
        with torch.no_grad():
            return self.spec.parity.sequence(self.module, dict(inputs))

    def program(self, form: Form, precision: str, fixed: Mapping[str, int] | None = None) -> "ExportedProgram":
        """The traced module in this precision, with every axis dynamic but those `fixed` to a size; not to be changed.

        A module without a recurrence has one program for all forms.
        """
        rest = (precision, tuple(sorted((fixed or {}).items())))
        for key in ((form, *rest), (None, *rest)):
            if key in self._programs:
                return self._programs[key]
        program, heeded = self._trace(form, precision, fixed or {})
        return self._programs.setdefault((form if heeded else None, *rest), program)

    def example(self, fixed: Mapping[str, int]) -> Tensors:
        """Complete inputs at the opt sizes, but for those `fixed`; the same in every call."""
        sizes = {**self.signature.sizes("opt"), **fixed}
        return {**self.draw_inputs(np.random.default_rng(0), sizes), **self.signature.zero_state(sizes["batch"])}

    def _trace(self, form: Form, precision: str, fixed: Mapping[str, int]) -> tuple["ExportedProgram", bool]:
        """The program, and whether it depends on the form."""
        import torch

        free = [axis for axis in self.signature.axes if axis.name not in fixed]
        dims = {axis.name: torch.export.Dim(axis.name, min=axis.min, max=axis.max) for axis in free}
        shapes = [
            {i: dims[size] for i, size in enumerate(tensor.shape) if size in dims} for tensor in self.signature.inputs
        ]
        module = cast(self.module, precision)
        positional, variadic = _parameters(module)
        variadic = variadic and len(shapes) > positional
        torch._dynamo.reset()  # guards of an earlier trace of a recurrence are wrong for another dtype
        with torch.no_grad(), scan_form(form) as heed:
            program = torch.export.export(
                module,
                self._arguments(self.example(fixed)),
                dynamic_shapes=(*shapes[:positional], tuple(shapes[positional:])) if variadic else tuple(shapes),
                strict=False,
            )
        return program, heed.paid

    def _arguments(self, inputs: Mapping[str, np.ndarray]) -> tuple["torch.Tensor", ...]:
        import torch

        return tuple(torch.from_numpy(inputs[tensor.name]) for tensor in self.signature.inputs)


class LastSource:
    """The source that was used last: the cells of a model share its traces, and memory holds one model at a time."""

    def __init__(self) -> None:
        self._last: Source | None = None

    def of(self, spec: ModelSpec, checkpoint: Checkpoint, texts: CalibrationTexts) -> Source:
        """The same source as before if model, checkpoint and texts are."""
        last = self._last
        if last and (last.spec, last.checkpoint.digest, last.texts) == (spec, checkpoint.digest, texts):
            return last
        last = self._last = None  # two originals may not fit in memory
        self._last = Source(spec, checkpoint, texts)
        return self._last


def cast(module: "torch.nn.Module", precision: str) -> "torch.nn.Module":
    """The module itself in fp32, or a copy with its parameters in fp16 or bf16."""
    import torch

    if precision == "fp32":
        return module
    return copy.deepcopy(module).to({"fp16": torch.float16, "bf16": torch.bfloat16}[precision])


def _parameters(module: "torch.nn.Module") -> tuple[int, bool]:
    """How many named arguments `forward` takes, and whether it takes the rest as *state."""
    import inspect

    kinds = [parameter.kind for parameter in inspect.signature(module.forward).parameters.values()]
    variadic: Any = inspect.Parameter.VAR_POSITIONAL
    return len([kind for kind in kinds if kind is not variadic]), variadic in kinds
