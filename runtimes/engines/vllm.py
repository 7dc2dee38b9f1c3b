"""vLLM, on a CPU or a GPU: a decoder that generates, scores or embeds, from a server process of its own."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.artifact import Artifact, read_json
from runtimes.errors import ArtifactError, EngineError, InputError
from runtimes.runtime import Backend, Runtime
from runtimes.tensors import Tensors
from runtimes.vllm.artifact import (
    CHECKPOINT,
    ENGINE_FILE,
    NEXT_IDS,
    TOKEN_LOGPROBS,
    engine_arguments,
    real_rows,
    task_of,
)
from runtimes.vllm.client import Completion, Prompt
from runtimes.vllm.process import VllmModel
from runtimes.vllm.server import Reported

PACKED = "pack-quantized"  # compressed-tensors' format of weights of 4 and 8 bits


class VllmRuntime(Runtime):
    """Runs `checkpoint/` with the arguments of `model.json`; runtimes.vllm.artifact has the inputs and outputs.

    `port`, `log` and `start_timeout_s` are the server's; see `VllmServer`.
    """

    engine = "vllm"
    served_by = "triton_vllm"
    # It takes a minute to start and some seconds to stop.
    backend = Backend(proxy="vllm", completes_config=True, start_timeout_s=600.0, exit_timeout_s=12)
    remote = True

    def __init__(self, root: Path, artifact: Artifact, *, device: str = "cpu", threads: int = 1, **server: Any) -> None:
        super().__init__(root, artifact, device=device, threads=threads)
        self.task = task_of(artifact)
        self.server = server
        self._model: VllmModel | None = None
        self._reported: Reported | None = None

    def open(self) -> None:
        self.refuse_device()
        arguments = self._arguments()
        model = VllmModel(arguments, device=self.device, threads=self.threads, **self.server)
        try:
            self._reported = model.open()
            method = self._quantization().get("quant_method", "none")
            expected = {"device": self.device, "quantization": method, "dtype": arguments.get("dtype", "auto")}
            refuse_fallback(self.artifact.name, expected, self._reported)
        except BaseException:
            model.close()
            raise
        self._model = model

    def infer(self, inputs: Mapping[str, np.ndarray]) -> Tensors:
        rows, mask = real_rows(inputs), inputs["attention_mask"].astype(bool)
        if self.task == "embed":
            return {self.signature.outputs[0].name: self.model.embed(rows)}
        outputs: Tensors = {TOKEN_LOGPROBS: np.zeros(mask.shape, np.float32), NEXT_IDS: np.zeros(mask.shape, np.int64)}
        for row, (logprobs, next_ids) in enumerate(self.model.score(rows)):
            outputs[TOKEN_LOGPROBS][row, mask[row]] = logprobs
            outputs[NEXT_IDS][row, mask[row]] = next_ids
        return outputs

    def complete(self, prompts: Sequence[Prompt], **sampling: Any) -> list[Completion]:
        """The completion of each prompt; `sampling` has the parameters of OpenAI's API."""
        return self._generating().complete(prompts, **sampling)

    def complete_stream(self, prompt: Prompt, **sampling: Any) -> Iterator[Completion]:
        """The completion of a prompt, piece by piece."""
        return self._generating().stream(prompt, **sampling)

    def embed(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """The vectors of texts or token ids, float32 [prompts, width]."""
        if self.task != "embed":
            raise InputError(f"{self.artifact.name}: expected a model that embeds, found one of task {self.task}")
        return self.model.embed(prompts)

    def metrics(self) -> dict[str, float]:
        """vLLM's own counters, by name."""
        return self.model.metrics()

    def close(self) -> None:
        if self._model is not None:
            self._model.close()
        self._model = None

    @property
    def provider(self) -> str:
        return str(self._reported) if self._model else "not open"

    @property
    def model(self) -> VllmModel:
        if self._model is None:
            raise EngineError(f"{self.artifact.name}: expected an open runtime, found a closed one; enter it first")
        return self._model

    def _generating(self) -> VllmModel:
        if self.task != "generate":
            raise InputError(f"{self.artifact.name}: expected a model that generates, found one of task {self.task}")
        return self.model

    def _arguments(self) -> dict[str, Any]:
        """The engine's arguments; an error in one line for values that vLLM would refuse late or replace."""
        arguments, quantized = engine_arguments(self.root), self._quantization()
        dtype, source = arguments.get("dtype", "auto"), self.root / ENGINE_FILE
        if quantized.get("format") == PACKED and dtype == "float32":
            raise EngineError(f"{source}: expected dtype bfloat16 or float16 for packed weights, found {dtype}")
        if not quantized and dtype == "auto" and self._config().get("dtype") == "float32":
            raise ArtifactError(f"{source}: expected a dtype, found auto: vLLM would run float32 weights in bfloat16")
        longest = self.signature.axis("tokens").max + (self.task == "generate")  # a score needs one more token
        if arguments.get("max_model_len", longest) < longest:
            raise ArtifactError(
                f"{source}: expected max_model_len of {longest} or more, found {arguments['max_model_len']}"
            )
        return arguments if self.task == "generate" else {"runner": "pooling", **arguments}

    def _config(self) -> dict[str, Any]:
        config = read_json(self.root / CHECKPOINT / "config.json")
        if not isinstance(config, dict):
            raise ArtifactError(f"{self.root / CHECKPOINT}: expected a Hugging Face config; export the model again")
        return config

    def _quantization(self) -> dict[str, Any]:
        return self._config().get("quantization_config") or {}


def refuse_fallback(name: str, expected: Mapping[str, str], reported: Reported) -> None:
    """`EngineError` if vLLM silently runs something else than requested."""
    for what, wanted in expected.items():
        found = getattr(reported, what)
        if wanted not in (found, "auto"):
            raise EngineError(f"vllm on {name}: expected {what} {wanted}, it runs {found}")


RUNTIME = VllmRuntime
