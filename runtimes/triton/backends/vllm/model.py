"""Triton's `vllm` backend for a core without one: text in, text out piece by piece, from vLLM in a process of its own.

It serves an unmodified entry, config.pbtxt and N/model.json, and names inputs and outputs as NVIDIA's backend does. The
requests of all clients go to vLLM, which makes its own batches; Triton makes none.
"""

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
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

from runtimes.errors import InputError, SlipwayError, one_line
from runtimes.host.gpu import gpu
from runtimes.triton.request_queue import Limits
from runtimes.vllm.artifact import engine_arguments
from runtimes.vllm.client import Completion
from runtimes.vllm.process import VllmModel

TEXT, FLAG, NUMBER, COUNT = "TYPE_STRING", "TYPE_BOOL", "TYPE_FP32", "TYPE_UINT32"
OPTIONAL_OUTPUTS = ("finish_reason", "cumulative_logprob", "logprobs", "num_input_tokens", "num_output_tokens")
INPUTS = {
    "text_input": TEXT,
    "stream": FLAG,
    "sampling_parameters": TEXT,
    "exclude_input_in_output": FLAG,
    **{f"return_{name}": FLAG for name in OPTIONAL_OUTPUTS},
    "embedding_request": TEXT,  # the body of a request to OpenAI's API: {"input": ...}
}
OUTPUTS = {
    "text_output": (TEXT, -1),
    "finish_reason": (TEXT, -1),
    "cumulative_logprob": (NUMBER, -1),
    "logprobs": (TEXT, -1),
    "num_input_tokens": (COUNT, 1),
    "num_output_tokens": (COUNT, -1),
}
REQUESTS = 256  # at once; vLLM's own default
FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
BUNDLE = "nvidia_pytriton.libs"  # libraries of the bundled core, which are not vLLM's


class TritonPythonModel:
    """One entry, and the vLLM server behind it."""

    @staticmethod
    def auto_complete_config(config: Any) -> Any:
        """The config with all inputs and outputs that it did not name itself."""
        given = config.as_dict()
        named = {tensor["name"] for tensor in (*given["input"], *given["output"])}
        for name, kind in INPUTS.items():
            if name not in named:
                optional = name != "text_input"
                config.add_input({"name": name, "data_type": kind, "dims": [1], "optional": optional})
        for name, (kind, size) in OUTPUTS.items():
            if name not in named:
                config.add_output({"name": name, "data_type": kind, "dims": [size]})
        config.set_max_batch_size(0)
        config.set_model_transaction_policy({"decoupled": True})
        return config

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        if not pb_utils.using_decoupled_model_transaction_policy(config):
            raise pb_utils.TritonModelException("expected a decoupled model_transaction_policy, found none")
        self.outputs = {output["name"] for output in config["output"]}
        threads = config["parameters"].get("intra_op_thread_count", {}).get("string_value", "1")
        libraries = os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)
        os.environ["LD_LIBRARY_PATH"] = os.pathsep.join(path for path in libraries if not path.endswith(BUNDLE))
        try:
            arguments = engine_arguments(Path(args["model_repository"], args["model_version"]))
            self.model = VllmModel(arguments, device="cuda" if gpu() else "cpu", threads=int(threads))
            reported = self.model.open()
        except SlipwayError as error:
            raise pb_utils.TritonModelException(str(error)) from error
        pb_utils.Logger.log_info(f"{args['model_name']} runs in {reported}")
        self.limits = Limits.of(config)
        self.room = threading.Semaphore(REQUESTS + self.limits.size)
        self.pool = ThreadPoolExecutor(REQUESTS)

    def execute(self, requests: list[Any]) -> None:
        """Each request is answered by a thread of a pool, for which `room` requests may be under way or waiting."""
        for request in requests:
            given = {tensor.name(): tensor.as_numpy().ravel()[0] for tensor in request.inputs()}
            sender = request.get_response_sender()
            if self.room.acquire(blocking=False):
                self.pool.submit(self._respond, given, sender, time.monotonic())
            else:
                sender.send(refusal(self.limits.too_many()), flags=FINAL)

    def finalize(self) -> None:
        self.pool.shutdown()
        self.model.close()

    def _respond(self, given: Mapping[str, Any], sender: Any, arrived_s: float) -> None:
        """Send the pieces until the last one or until the client disconnects; a wrong request fails alone."""
        try:
            if self.limits.passed(arrived_s):
                raise self.limits.too_late()
            pieces = self._pieces(given)
            for tensors in pieces:
                if sender.is_cancelled():
                    pieces.close()  # which ends the request in vLLM
                    break
                sender.send(pb_utils.InferenceResponse([pb_utils.Tensor(*named) for named in tensors.items()]))
        except SlipwayError as error:
            sender.send(refusal(error))
        except Exception as error:  # in a thread of a pool, which would drop it silently
            pb_utils.Logger.log_error(f"vllm backend: {traceback.format_exc()}")
            sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError(f"the backend failed: {error!r}")))
            raise
        finally:
            self.room.release()
            sender.send(flags=FINAL)

    def _pieces(self, given: Mapping[str, Any]) -> Any:
        if "embedding_request" in given:
            return self._embed(given)
        return self._stream(given) if given.get("stream") else self._complete(given)

    def _embed(self, given: Mapping[str, Any]) -> Iterator[dict[str, np.ndarray]]:
        prompt = parse("embedding_request", given["embedding_request"]).get("input")
        if not isinstance(prompt, str | list):
            raise InputError("embedding_request: expected 'input' with a text or token ids, found neither")
        (vector,) = self.model.embed([prompt])
        yield {"text_output": texts(json.dumps(vector.tolist()))}

    def _complete(self, given: Mapping[str, Any]) -> Iterator[dict[str, np.ndarray]]:
        prompt, sampling = read(given)
        before = "" if given.get("exclude_input_in_output") else prompt
        completions = self.model.complete([prompt], **sampling)
        wanted = self._wanted(given)
        yield {"text_output": texts(*(before + each.text for each in completions)), **extras(completions, wanted)}

    def _stream(self, given: Mapping[str, Any]) -> Iterator[dict[str, np.ndarray]]:
        prompt, sampling = read(given)
        if not given.get("exclude_input_in_output", True):
            raise InputError("exclude_input_in_output: expected true for a stream, found false")
        if int(sampling.get("n", 1)) != 1:
            raise InputError(f"sampling_parameters: expected n = 1 for a stream, found {sampling['n']}")
        wanted, prompt_tokens = self._wanted(given), None
        for piece in self.model.stream(prompt, **sampling):
            prompt_tokens = piece.prompt_tokens or prompt_tokens  # the API returns it once, NVIDIA's every time
            yield {"text_output": texts(piece.text), **extras([replace(piece, prompt_tokens=prompt_tokens)], wanted)}

    def _wanted(self, given: Mapping[str, Any]) -> set[str]:
        return {name for name in OPTIONAL_OUTPUTS if given.get(f"return_{name}") and name in self.outputs}


def refusal(error: SlipwayError) -> Any:
    code = getattr(pb_utils.TritonError, error.triton_code)
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), code))


def read(given: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The prompt and the sampling parameters of a request; with logprobs of tokens where an output needs them."""
    try:
        prompt = given["text_input"].decode()
    except UnicodeDecodeError as error:
        raise InputError(f"text_input: expected UTF-8, found {one_line(error)}") from error
    sampling = parse("sampling_parameters", given.get("sampling_parameters", b"{}"))
    if "lora_name" in sampling:
        raise InputError("sampling_parameters: expected no lora_name, found one; adapters are merged before export")
    if given.get("return_logprobs") or given.get("return_cumulative_logprob"):
        sampling.setdefault("logprobs", 0)
    return prompt, sampling


def parse(name: str, text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:  # also that of bytes which are not UTF-8
        raise InputError(f"{name}: expected JSON in UTF-8, found {one_line(error)}") from error
    if not isinstance(value, dict):
        raise InputError(f"{name}: expected a JSON object, found {ascii(value)[:80]}")
    return value


def extras(completions: list[Completion], wanted: set[str]) -> dict[str, np.ndarray]:
    """The requested outputs beside the text, in the forms of NVIDIA's backend."""
    makers = {
        "finish_reason": lambda: texts(*(str(each.finish_reason) for each in completions)),
        "cumulative_logprob": lambda: np.array([sum(each.logprobs or ()) for each in completions], np.float32),
        "logprobs": lambda: texts(*(json.dumps(chosen(each)) for each in completions)),
        "num_input_tokens": lambda: np.array([completions[0].prompt_tokens], np.uint32),
        "num_output_tokens": lambda: np.array([len(each.token_ids) for each in completions], np.uint32),
    }
    return {name: make() for name, make in makers.items() if name in wanted}


def chosen(completion: Completion) -> list[dict[int, dict[str, float]]]:
    """The logprob of each token, in the layout of vLLM's own objects."""
    pairs = zip(completion.token_ids, completion.logprobs or (), strict=True)
    return [{token: {"logprob": logprob}} for token, logprob in pairs]


def texts(*values: str) -> np.ndarray:
    return np.array([value.encode() for value in values], np.object_)
