"""A language model on a Triton server, ours or NVIDIA's, whose vllm backend takes and returns texts."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.artifact import Artifact
from runtimes.errors import EngineError, InputError
from runtimes.tensors import Tensors
from runtimes.triton.remote import RemoteModel
from runtimes.vllm.artifact import real_rows, task_of
from runtimes.vllm.client import Completion, Prompt

EXPECTED = {"inputs": {"text_input", "stream", "sampling_parameters"}, "outputs": {"text_output"}}


class TritonVllmRuntime(RemoteModel):
    """Sends requests to the entry of an artifact for vLLM on the gRPC server at `url` ("host:port")."""

    engine = "triton_vllm"
    protocols = ("grpc",)  # answers arrive as a stream

    def __init__(self, root: Path, artifact: Artifact, **options: Any) -> None:
        super().__init__(root, artifact, **options)
        self.task = task_of(artifact)

    def check_metadata(self, metadata: Mapping[str, Any]) -> None:
        for kind, expected in EXPECTED.items():
            found = {tensor["name"] for tensor in metadata[kind]}
            if not expected <= found:
                raise EngineError(
                    f"{self.model} at {self.url}: expected {kind} {', '.join(sorted(expected))} of Triton's vllm "
                    f"backend, found {', '.join(sorted(found)) or 'none'}"
                )

    def infer(self, inputs: Mapping[str, np.ndarray]) -> Tensors:
        if self.task != "embed":
            raise InputError(
                f"{self.model} at {self.url}: expected a request to generate, found one for scores, which Triton's "
                "vllm backend does not return; give max_tokens, or open the artifact itself"
            )
        return {self.signature.outputs[0].name: self.embed(real_rows(inputs))}

    def complete(self, prompts: Sequence[str], **sampling: Any) -> list[Completion]:
        """The completion of each text, without the ids of its tokens."""
        return [each for prompt in prompts for each in self._generate(prompt, sampling, stream=False)]

    def complete_stream(self, prompt: str, **sampling: Any) -> Iterator[Completion]:
        """The completion of a text, piece by piece."""
        return self._generate(prompt, sampling, stream=True)

    def embed(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """The vectors of texts or token ids, float32 [prompts, width]."""
        return np.array([self._embed(prompt) for prompt in prompts], np.float32)

    def _generate(self, prompt: str, sampling: Mapping[str, Any], *, stream: bool) -> Iterator[Completion]:
        inputs = {
            "text_input": text(prompt),
            "stream": np.array([stream]),
            "exclude_input_in_output": np.array([True]),
            "sampling_parameters": text(json.dumps(sampling)),
            "return_finish_reason": np.array([True]),
        }
        for response in self._responses(inputs):
            for written, reason in zip(response["text_output"], response["finish_reason"], strict=True):
                finished = None if reason == b"None" else reason.decode()
                yield Completion(text=written.decode(), token_ids=(), finish_reason=finished)

    def _embed(self, prompt: Prompt) -> list[float]:
        request = {"input": prompt if isinstance(prompt, str) else list(map(int, prompt))}
        (response,) = self._responses({"text_input": text(""), "embedding_request": text(json.dumps(request))})
        vector: list[float] = json.loads(response["text_output"].item())
        return vector

    def _responses(self, inputs: Tensors) -> Iterator[Tensors]:
        return self.client.stream(self.model, inputs)


def text(value: str) -> np.ndarray:
    return np.array([value.encode()], np.object_)


RUNTIME = TritonVllmRuntime
