"""Exported programs of torch, eager or compiled, on CPU or CUDA: the baseline of the other engines."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from runtimes import torch_program
from runtimes.artifact import Artifact
from runtimes.errors import EngineError, require
from runtimes.runtime import Runtime
from runtimes.tensors import Tensors

PROGRAM_FILE = "program.pt2"
STEP_FILE = "step.pt2"
SIZES_COMPILED = 64


class Torch(Runtime):
    """Runs `program.pt2`, and `step.pt2` instead where there is one and the time axis is 1.

    `compiled` uses torch.compile with static shapes, the fastest mode of torch.
    """

    engine = "torch"

    def __init__(
        self,
        root: Path,
        artifact: Artifact,
        *,
        device: str = "cpu",
        threads: int = 1,
        compiled: bool = False,
    ) -> None:
        super().__init__(root, artifact, device=device, threads=threads)
        self.compiled = compiled
        self._run: Callable[..., Any] | None = None
        self._step: Callable[..., Any] | None = None
        self._checked = False
        self._recurrent = artifact.signature.free_inputs[0].name

    def open(self) -> None:
        torch = require("torch", extra="export")
        self.refuse_device(torch.cuda.is_available())
        torch.set_num_threads(self.threads)
        if self.compiled:  # each size is compiled separately; past the limit, by default 8, dynamo stops silently
            torch._dynamo.config.recompile_limit = SIZES_COMPILED
        self._run = self._load(PROGRAM_FILE)
        self._step = self._load(STEP_FILE) if (self.root / STEP_FILE).is_file() else None

    def infer(self, inputs: Mapping[str, np.ndarray]) -> Tensors:
        torch = require("torch", extra="export")
        outputs = self.call({name: torch.from_numpy(array).to(self.device) for name, array in inputs.items()})
        return {name: value.cpu().numpy() for name, value in outputs.items()}

    def call(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs for inputs that are tensors of torch on `device`; they stay there, and nothing is checked."""
        import torch

        assert self._run is not None, "run() outside of the with block"
        step = self._step is not None and inputs[self._recurrent].shape[1] == 1
        arguments = [inputs[tensor.name] for tensor in self.signature.inputs]
        with torch.inference_mode():
            outputs = self._step(*arguments) if step and self._step else self._run(*arguments)
        if self.compiled and not self._checked:
            self._check_compiled(torch)
        return {tensor.name: value for tensor, value in zip(self.signature.outputs, outputs, strict=True)}

    def close(self) -> None:
        self._run = self._step = None

    @property
    def provider(self) -> str:
        return f"torch {'compiled' if self.compiled else 'eager'} on {self.device}"

    @property
    def cuda_stream(self) -> int | None:
        return (
            int(require("torch", extra="export").cuda.current_stream().cuda_stream) if self.device == "cuda" else None
        )

    def _check_compiled(self, torch: Any) -> None:
        """`EngineError` where torch.compile gave up silently, so that the program runs eagerly."""
        frames = torch._dynamo.utils.counters["frames"]
        if not frames["ok"]:
            raise EngineError(
                f"{self.artifact.name}: expected torch.compile to compile it, found {dict(frames) or 'nothing'}"
            )
        self._checked = True

    def _load(self, name: str) -> Callable[..., Any]:
        """The program as a plain function of the inputs: `ExportedProgram.module()` costs 0.4 ms a call in checks."""
        import torch
        from torch.export.passes import move_to_device_pass

        program = torch_program.load(self.root / name)
        if self.device != "cpu":
            program = move_to_device_pass(program, self.device)
        held = {**program.state_dict, **program.constants}
        weights = [held[spec.target] for spec in program.graph_signature.input_specs if spec.target is not None]
        graph = torch.compile(program.graph_module, dynamic=False) if self.compiled else program.graph_module
        return lambda *inputs: graph(*weights, *inputs)


RUNTIME = Torch
