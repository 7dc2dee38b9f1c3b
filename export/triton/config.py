"""The config of each model in the repository: the artifact, the two steps around it, the ensemble of all three."""

from collections.abc import Mapping

from export.triton.backend import Backend, all_backends
from export.triton.scheduling import UNLIMITED, Scheduling
from export.triton.schema import (
    TYPES,
    Fields,
    ModelConfig,
    dims,
    instances,
    message,
    newest,
    parameters,
    tensor,
    text,
)
from runtimes.artifact import Artifact
from runtimes.errors import ArtifactError
from runtimes.tensors import BATCH, TensorSpec

STEPS = ("encode", "decode")
WRITE = "write"  # the step of a model that generates by itself, and not in an ensemble
REQUEST, ANSWER = "request", "answer"

SEQUENCE_IDLE_US = 60_000_000
SEQUENCES = 1024  # open at once; later ones wait until one ends
VERSIONS_LOADED = 2  # of a step of an ensemble: the one in use, and the one that is to take its place


def model_config(
    artifact: Artifact, engine: str, scheduling: Scheduling = UNLIMITED, loaded: int = VERSIONS_LOADED
) -> ModelConfig:
    """The config of an artifact that is served by the backend of `engine`, in its `loaded` newest versions.

    A backend with configs of its own decides by itself how many versions are loaded. `ArtifactError` for an engine
    without a backend.
    """
    backends = all_backends()
    if engine not in backends:
        raise ArtifactError(
            f"{artifact.name}: expected a Triton backend of {', '.join(backends)}, found '{engine}'; "
            "publish it as not served"
        )
    backend = backends[engine]
    if backend.config:
        return message(backend.config(artifact, scheduling))
    return message(tensor_config(artifact, backend, scheduling, loaded))


def tensor_config(artifact: Artifact, backend: Backend, scheduling: Scheduling, loaded: int) -> Fields:
    """The fields of the config of an artifact with the tensors of its signature."""
    served_by = {"platform": backend.platforms[0]} if backend.config_names_platform else {"backend": backend.name}
    on_gpu = backend.gpu_only or "gpu" in artifact.built_with
    recurrent = bool(artifact.signature.state)
    return {
        "name": artifact.name,
        **served_by,
        "max_batch_size": rows(artifact),
        "input": [tensor(spec) for spec in artifact.signature.free_inputs],
        "output": [tensor(spec) for spec in artifact.signature.visible_outputs],
        "version_policy": newest(loaded),
        **(sequences(artifact) if recurrent else batches(artifact, scheduling)),
        **instances("GPU" if on_gpu else "CPU", 1 if recurrent else scheduling.instances),
        **parameters(**({} if on_gpu else backend.cpu_parameters)),
    }


def step_config(
    artifact: Artifact, step: str, scheduling: Scheduling = UNLIMITED, loaded: int = VERSIONS_LOADED
) -> ModelConfig:
    """The config of a Python step: JSON request to tensors (`encode`) or tensors to JSON answer (`decode`).

    A step around a recurrent model has no limits, as that has none: a sequence would lose a frame.
    """
    if artifact.signature.state:
        scheduling = UNLIMITED
    if step == "encode":
        tensors = {"input": [text(REQUEST)], "output": [tensor(spec) for spec in artifact.signature.free_inputs]}
    else:
        tensors = {"input": [tensor(spec) for spec in artifact.signature.visible_outputs], "output": [text(ANSWER)]}
    return message(
        {
            "name": step_name(artifact.model, step),
            "backend": "python",
            "max_batch_size": rows(artifact),
            **tensors,
            "version_policy": newest(loaded),
            **(single_requests(scheduling) if scheduling.limited else {}),
            **instances("CPU", scheduling.instances),
            **parameters(step=step),
        }
    )


def writer_config(artifact: Artifact, name: str, scheduling: Scheduling = UNLIMITED) -> ModelConfig:
    """The config of the model that generates with this artifact of a step: one JSON request in, many answers out.

    It has its own batches and its own queue, so Triton makes none.
    """
    return message(
        {
            "name": name,
            "backend": "python",
            "max_batch_size": 0,
            "input": [text(REQUEST)],
            "output": [text(ANSWER)],
            "version_policy": newest(1),
            "model_transaction_policy": {"decoupled": True},
            **instances("GPU" if "gpu" in artifact.built_with else "CPU"),
            **parameters(step=WRITE, **scheduling.parameters()),
        }
    )


def ensemble_config(artifact: Artifact, numbers: Mapping[str, int]) -> ModelConfig:
    """The config of the ensemble: a JSON request in, a JSON answer out, for clients without tensors.

    `numbers` is the version of each step by name. With the newest of each, a request would mix an old model with a new
    pipeline for as long as a server that polls loads one later than the other.
    """
    encode, decode = (step_name(artifact.model, step) for step in STEPS)
    given = {spec.name: spec.name for spec in artifact.signature.free_inputs}
    returned = {spec.name: spec.name for spec in artifact.signature.visible_outputs}
    return message(
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
    """The name under which Triton serves a step of a model's ensemble."""
    return f"{model}_{step}"


def rows(artifact: Artifact) -> int:
    """The largest batch that the artifact was verified for."""
    return artifact.signature.axis(BATCH).max


def batches(artifact: Artifact, scheduling: Scheduling) -> Fields:
    """Requests that wait while a batch runs are the next batch.

    No delay and no preferred sizes: on two cores they cost latency and won nothing.
    """
    batch = artifact.signature.axis(BATCH)
    return {
        "dynamic_batching": scheduling.policy(),
        "model_warmup": [warmup(artifact, size) for size in sorted({1, batch.opt, batch.max})],
    }


def single_requests(scheduling: Scheduling) -> Fields:
    """A queue of single requests, as a Python step handles them.

    In a batch each would wait for all: at several times the knee answers took 0.20 s instead of 0.08 (`strategy`, p50).
    """
    return {"dynamic_batching": {"preferred_batch_size": [1], **scheduling.policy()}}


def warmup(artifact: Artifact, batch: int) -> Fields:
    """Zeros, so that the first client does not pay for lazy initialisation."""
    sizes = artifact.signature.sizes("opt")
    inputs = {
        spec.name: {
            "data_type": TYPES[spec.dtype],
            "dims": list(spec.resolve(sizes)[1:]) or [1],
            "zero_data": True,
        }
        for spec in artifact.signature.inputs
    }
    return {"name": f"zeros_{batch}", "batch_size": batch, "inputs": inputs}


def sequences(artifact: Artifact) -> Fields:
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


def carried(spec: TensorSpec, result: str) -> Fields:
    """A recurrent state that Triton keeps between the requests of a sequence, zero at its start."""
    kind = {"data_type": TYPES[spec.dtype], "dims": dims(spec)}
    return {
        "input_name": spec.name,
        "output_name": result,
        **kind,
        "initial_state": [{"name": "zero", **kind, "zero_data": True}],
    }


def ensemble_step(
    model: str, numbers: Mapping[str, int], inputs: Mapping[str, str], outputs: Mapping[str, str]
) -> Fields:
    """A step that reads `inputs` and writes `outputs`: the model's name of a tensor -> the ensemble's."""
    return {
        "model_name": model,
        "model_version": numbers[model],
        "input_map": dict(inputs),
        "output_map": dict(outputs),
    }
