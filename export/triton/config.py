"""What Triton is told about a model, as config.pbtxt: the artifact, the two steps around it, the ensemble of all."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from runtimes.artifact import Artifact
from runtimes.errors import ArtifactError, InputError
from runtimes.tensors import BATCH, TensorSpec
from runtimes.triton.request_queue import SIZE, TIMEOUT_MS
from runtimes.vllm.artifact import ENGINE_FILE, task_of

# What the newest version folder must hold for a Triton backend; the runtime of an artifact is the backend's name.
MODEL_FILES = {
    "onnxruntime": "model.onnx",
    "openvino": "model.xml",
    "tensorrt": "model.plan",
    "vllm": ENGINE_FILE,
}
STEPS = ("encode", "decode")
WRITE = "write"  # the step of a model that writes by itself, and not in an ensemble
REQUEST, ANSWER = "request", "answer"
TYPES = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "int64": "TYPE_INT64",
    "int32": "TYPE_INT32",
    "uint8": "TYPE_UINT8",
    "bool": "TYPE_BOOL",
}

# What NVIDIA's vllm backend takes and gives (its src/model.py), but images.
TEXT_INPUT = "text_input"
OPTIONAL_TEXT_INPUTS = {
    "stream": "TYPE_BOOL",
    "sampling_parameters": "TYPE_STRING",
    "exclude_input_in_output": "TYPE_BOOL",
    "return_finish_reason": "TYPE_BOOL",
    "return_num_input_tokens": "TYPE_BOOL",
    "return_num_output_tokens": "TYPE_BOOL",
}
EMBEDDING_INPUTS = {"embedding_request": "TYPE_STRING"}
TEXT_OUTPUTS = {
    "text_output": ("TYPE_STRING", (-1,)),
    "finish_reason": ("TYPE_STRING", (-1,)),
    "num_input_tokens": ("TYPE_UINT32", (1,)),
    "num_output_tokens": ("TYPE_UINT32", (-1,)),
}

SEQUENCE_IDLE_US = 60_000_000
SEQUENCES = 1024  # open at once; later ones wait until one ends
VERSIONS_LOADED = 2  # of a step of an ensemble: the one in use, and the one that is to take its place

Message = dict[str, Any]


class Word(str):
    """An enum's value, written without quotes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheduling:
    """How many requests a stateless model and each step around it take at once, how many may wait there, how long.

    More are refused. The steps have limits of their own because an ensemble has none: what is slowest is waited for.

    instances   copies that work side by side, each step's in a process of its own
    queue       requests that may wait; 0 is any number, and 64 before a model that queues by itself
    timeout_ms  how long one may wait; 0 is for ever

    `InputError` for a limit with a single instance: Triton's batcher then sleeps for half a second when a request
    arrives while the instance works, and nothing wakes it (triton-inference-server/server#8870; measured with 2.51).
    """

    instances: int = 1
    queue: int = 0
    timeout_ms: int = 0

    def __post_init__(self) -> None:
        if self.instances < 1 or self.queue < 0 or self.timeout_ms < 0:
            raise InputError(f"expected 1 or more instances and limits of 0 or more, found {self}")
        if self.limited and self.instances == 1:
            raise InputError(
                "expected 2 or more --instances with a limit on waiting, found 1: Triton stalls for 500 ms with one"
            )

    @property
    def limited(self) -> bool:
        return bool(self.queue or self.timeout_ms)

    def policy(self) -> Message:
        """What the dynamic batcher is told; nothing where there is no limit."""
        limits: Message = {"max_queue_size": self.queue} if self.queue else {}
        if self.timeout_ms:
            limits |= {"timeout_action": Word("REJECT"), "default_timeout_microseconds": self.timeout_ms * 1000}
        return {"default_queue_policy": limits} if limits else {}

    def parameters(self) -> dict[str, str]:
        """What a model is told that queues by itself; nothing where its own default is the limit."""
        given = {SIZE: self.queue, TIMEOUT_MS: self.timeout_ms}
        return {name: str(value) for name, value in given.items() if value}


UNLIMITED = Scheduling()


def model_config(
    artifact: Artifact, backend: str, scheduling: Scheduling = UNLIMITED, loaded: int = VERSIONS_LOADED
) -> str:
    """config.pbtxt for an artifact served by `backend`, in its `loaded` newest versions; of vLLM's only the newest.

    `ArtifactError` for a backend that Triton does not have.
    """
    if backend not in MODEL_FILES:
        raise ArtifactError(
            f"{artifact.name}: expected a Triton backend of {', '.join(MODEL_FILES)}, found '{backend}'; "
            "publish it as not served"
        )
    if backend == "vllm":
        return render(language_model_config(artifact, scheduling))
    served_by = {"platform": "tensorrt_plan"} if backend == "tensorrt" else {"backend": backend}
    on_gpu = backend == "tensorrt" or "gpu" in artifact.built_with
    recurrent = bool(artifact.signature.state)
    message = {
        "name": artifact.name,
        **served_by,
        "max_batch_size": rows(artifact),
        "input": [tensor(spec) for spec in artifact.signature.free_inputs],
        "output": [tensor(spec) for spec in artifact.signature.visible_outputs],
        "version_policy": newest(loaded),
        **(sequences(artifact) if recurrent else batches(artifact, scheduling)),
        "instance_group": instances("GPU" if on_gpu else "CPU", 1 if recurrent else scheduling.instances),
    }
    if backend == "onnxruntime" and not on_gpu:
        message["parameters"] = parameters(intra_op_thread_count="1", inter_op_thread_count="1")
    return render(message)


def language_model_config(artifact: Artifact, scheduling: Scheduling) -> Message:
    """Text in, text out, in as many responses as the client asks for; vLLM makes the batches and picks the device.

    The tensors are NVIDIA's, whose vllm backend would complete them; the bundled core completes nothing.
    """
    embeds = task_of(artifact) == "embed"
    given = {**OPTIONAL_TEXT_INPUTS, **(EMBEDDING_INPUTS if embeds else {})}
    optional = [{"name": name, "data_type": Word(kind), "dims": [1], "optional": True} for name, kind in given.items()]
    made = [{"name": name, "data_type": Word(kind), "dims": list(size)} for name, (kind, size) in TEXT_OUTPUTS.items()]
    return {
        "name": artifact.name,
        "backend": "vllm",
        "max_batch_size": 0,
        "model_transaction_policy": {"decoupled": True},
        "input": [text(TEXT_INPUT), *optional],
        "output": made,
        "version_policy": newest(1),
        "instance_group": instances("MODEL"),
        **({"parameters": parameters(**scheduling.parameters())} if scheduling.limited else {}),
    }


def step_config(
    artifact: Artifact, step: str, scheduling: Scheduling = UNLIMITED, loaded: int = VERSIONS_LOADED
) -> str:
    """config.pbtxt for a Python step: JSON request to tensors (`encode`) or tensors to JSON answer (`decode`).

    A step around a recurrent model is not limited, as that is not: a sequence would lose a frame.
    """
    if artifact.signature.state:
        scheduling = UNLIMITED
    if step == "encode":
        tensors = {"input": [text(REQUEST)], "output": [tensor(spec) for spec in artifact.signature.free_inputs]}
    else:
        tensors = {"input": [tensor(spec) for spec in artifact.signature.visible_outputs], "output": [text(ANSWER)]}
    return render(
        {
            "name": step_name(artifact.model, step),
            "backend": "python",
            "max_batch_size": rows(artifact),
            **tensors,
            "version_policy": newest(loaded),
            **(one_by_one(scheduling) if scheduling.limited else {}),
            "instance_group": instances("CPU", scheduling.instances),
            "parameters": parameters(step=step),
        }
    )


def writer_config(artifact: Artifact, name: str, scheduling: Scheduling = UNLIMITED) -> str:
    """config.pbtxt for the model that writes with this artifact of a step: one JSON request in, many answers out.

    It makes its own batches of what comes, and its own queue, so Triton makes none.
    """
    return render(
        {
            "name": name,
            "backend": "python",
            "max_batch_size": 0,
            "input": [text(REQUEST)],
            "output": [text(ANSWER)],
            "version_policy": newest(1),
            "model_transaction_policy": {"decoupled": True},
            "instance_group": instances("GPU" if "gpu" in artifact.built_with else "CPU"),
            "parameters": parameters(step=WRITE, **scheduling.parameters()),
        }
    )


def ensemble_config(artifact: Artifact, numbers: Mapping[str, int]) -> str:
    """config.pbtxt for the ensemble: a JSON request in, a JSON answer out, for whoever cannot speak in tensors.

    `numbers` is the version of each step by name. With the newest of each, a request would mix an old model with a new
    pipeline for as long as a server that polls loads one later than the other.
    """
    encode, decode = (step_name(artifact.model, step) for step in STEPS)
    given = {spec.name: spec.name for spec in artifact.signature.free_inputs}
    returned = {spec.name: spec.name for spec in artifact.signature.visible_outputs}
    return render(
        {
            "name": artifact.model,
            "platform": "ensemble",
            "max_batch_size": rows(artifact),
            "input": [text(REQUEST)],
            "output": [text(ANSWER)],
            "ensemble_scheduling": {
                "step": [
                    ensemble_step(encode, numbers, {REQUEST: REQUEST}, given),
                    ensemble_step(artifact.name, numbers, given, returned),
                    ensemble_step(decode, numbers, returned, {ANSWER: ANSWER}),
                ]
            },
        }
    )


def step_name(model: str, step: str) -> str:
    """Under which name Triton serves a step of a model's ensemble."""
    return f"{model}_{step}"


def rows(artifact: Artifact) -> int:
    """The largest batch the artifact was proved for."""
    return artifact.signature.axis(BATCH).max


def tensor(spec: TensorSpec) -> Message:
    """A tensor without its batch axis; the other dynamic axes are -1."""
    described = {"name": spec.name, "data_type": Word(TYPES[spec.dtype]), "dims": dims(spec)}
    # Triton has no tensor without dims: one number per row travels as [batch, 1].
    return described if len(spec.shape) > 1 else described | {"dims": [1], "reshape": {"shape": []}}


def dims(spec: TensorSpec) -> list[int]:
    """Sizes without the batch, -1 for a dynamic axis; a number per row has none here and travels as [1]."""
    return [size if isinstance(size, int) else -1 for size in spec.shape[1:]]


def text(name: str) -> Message:
    return {"name": name, "data_type": Word("TYPE_STRING"), "dims": [1]}


def batches(artifact: Artifact, scheduling: Scheduling) -> Message:
    """Requests that wait while a batch runs are the next batch.

    No delay and no preferred sizes: on two cores they cost latency and won nothing.
    """
    batch = artifact.signature.axis(BATCH)
    return {
        "dynamic_batching": scheduling.policy(),
        "model_warmup": [warmup(artifact, size) for size in sorted({1, batch.opt, batch.max})],
    }


def one_by_one(scheduling: Scheduling) -> Message:
    """A queue that hands on single requests, as a Python step handles them.

    In a batch each would wait for all: at several times the knee answers took 0.20 s instead of 0.08 (`strategy`, p50).
    """
    return {"dynamic_batching": {"preferred_batch_size": [1], **scheduling.policy()}}


def warmup(artifact: Artifact, batch: int) -> Message:
    """Zeros, so that the first client does not pay for lazy initialisation."""
    sizes = artifact.signature.sizes("opt")
    inputs = [
        {
            "key": spec.name,
            "value": {
                "data_type": Word(TYPES[spec.dtype]),
                "dims": list(spec.resolve(sizes)[1:]) or [1],
                "zero_data": True,
            },
        }
        for spec in artifact.signature.inputs
    ]
    return {"name": f"zeros_{batch}", "batch_size": batch, "inputs": inputs}


def sequences(artifact: Artifact) -> Message:
    """Triton keeps the state of each sequence, zero at first, and batches steps of different sequences.

    No control input is declared: the onnxruntime backend demands that a declared one is an input of the graph. There is
    no warm-up either: its requests pass by the sequence batcher, hence come without state.
    """
    specs = {spec.name: spec for spec in artifact.signature.inputs}
    return {
        "sequence_batching": {
            "max_sequence_idle_microseconds": SEQUENCE_IDLE_US,
            "oldest": {"max_candidate_sequences": SEQUENCES, "max_queue_delay_microseconds": 0},
            "state": [carried(specs[source], result) for source, result in artifact.signature.state],
        }
    }


def carried(spec: TensorSpec, result: str) -> Message:
    """A recurrent state that Triton keeps between the requests of a sequence, zero at its start."""
    kind = {"data_type": Word(TYPES[spec.dtype]), "dims": dims(spec)}
    return {
        "input_name": spec.name,
        "output_name": result,
        **kind,
        "initial_state": {"name": "zero", **kind, "zero_data": True},
    }


def ensemble_step(
    model: str, numbers: Mapping[str, int], inputs: Mapping[str, str], outputs: Mapping[str, str]
) -> Message:
    """A step that reads `inputs` and writes `outputs`: the model's name of a tensor -> the ensemble's."""
    return {
        "model_name": model,
        "model_version": numbers[model],
        "input_map": [{"key": key, "value": value} for key, value in inputs.items()],
        "output_map": [{"key": key, "value": value} for key, value in outputs.items()],
    }


def newest(count: int) -> Message:
    """A version policy: so many of the newest versions are loaded."""
    return {"latest": {"num_versions": count}}


def instances(kind: str, count: int = 1) -> Message:
    return {"count": count, "kind": Word(f"KIND_{kind}")}


def parameters(**values: str) -> list[Message]:
    return [{"key": key, "value": {"string_value": value}} for key, value in values.items()]


def render(message: Message) -> str:
    """A message in protobuf's text format."""
    return "\n".join(_lines(message, "")) + "\n"


def _lines(message: Message, indent: str) -> Iterator[str]:
    for name, value in message.items():
        if isinstance(value, list) and not any(isinstance(each, dict) for each in value):
            yield f"{indent}{name}: [{', '.join(map(_scalar, value))}]"
            continue
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, dict):
                yield f"{indent}{name} {{"
                yield from _lines(each, indent + "  ")
                yield f"{indent}}}"
            else:
                yield f"{indent}{name}: {_scalar(each)}"


def _scalar(value: str | int | bool) -> str:
    if isinstance(value, Word):
        return str(value)
    return json.dumps(value)  # quotes a string, and writes true and false
