"""NVIDIA's vllm backend for Triton: its configs, the folders that its entries name, and their checks."""

from collections.abc import Iterator
from pathlib import Path

from export.triton.backend import Backend
from export.triton.scheduling import UNLIMITED, Scheduling
from export.triton.schema import Fields, ModelConfig, instances, message, newest, parameters, text
from runtimes.artifact import Artifact, read_json
from runtimes.errors import SlipwayError
from runtimes.vllm.artifact import CHECKPOINT, ENGINE_FILE, TOKENIZER, task_of

NAME = "vllm"
# The inputs and outputs of the backend (its src/model.py), but images.
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
EMBEDDING_FILES = ("modules.json", "1_Pooling/config.json")


def config(artifact: Artifact, scheduling: Scheduling = UNLIMITED) -> Fields:
    """Text in, text out, in as many responses as the client requests; vLLM makes the batches and picks the device.

    NVIDIA's vllm backend would complete the tensors by itself; the bundled core completes nothing.
    """
    given = {**OPTIONAL_TEXT_INPUTS, **(EMBEDDING_INPUTS if task_of(artifact) == "embed" else {})}
    optional = [{"name": name, "data_type": kind, "dims": [1], "optional": True} for name, kind in given.items()]
    return {
        "name": artifact.name,
        "backend": NAME,
        "max_batch_size": 0,
        "model_transaction_policy": {"decoupled": True},
        "input": [text(TEXT_INPUT), *optional],
        "output": [{"name": name, "data_type": kind, "dims": size} for name, (kind, size) in TEXT_OUTPUTS.items()],
        "version_policy": newest(1),
        **instances("MODEL"),
        **parameters(**scheduling.parameters()),
    }


def server_paths(version: Path) -> dict[str, str]:
    """The paths of the model and its tokenizer for vLLM, which would read relative ones from its working directory."""
    return {"model": str(version / CHECKPOINT), "tokenizer": str(version / TOKENIZER)}


def check(version: Path, artifact: Artifact, found: ModelConfig, on_server: Path) -> Iterator[str]:
    """One line for each fault by which the vllm backend would fail, or serve another model."""
    try:
        expected = message(config(artifact))
    except SlipwayError as error:  # a manifest without a task
        yield str(error)
        return
    yield from _check_config(expected, found)
    yield from (f"version {version.name}, {line}" for line in _check_arguments(version, artifact, on_server))


def _check_config(expected: ModelConfig, found: ModelConfig) -> Iterator[str]:
    """Every setting that an export writes has the value it writes; other settings are the user's."""
    if not found.model_transaction_policy.decoupled:
        yield "expected model_transaction_policy decoupled, as tokens come one by one, found none"
    if found.max_batch_size:
        yield f"expected max_batch_size 0, for vLLM makes the batches, found {found.max_batch_size}"
    group = expected.instance_group[0]
    if [(each.count or 1, each.kind) for each in found.instance_group] != [(group.count, group.kind)]:
        yield "expected one instance group of KIND_MODEL with count 1, for vLLM picks the devices, found another"
    for what in ("input", "output"):
        own = {each.name: each for each in getattr(found, what)}
        for each in getattr(expected, what):
            if own.get(each.name) != each:
                found_one = "another" if each.name in own else "none"
                yield f"{what} '{each.name}': expected it as the vllm backend has it, found {found_one}"


def _check_arguments(version: Path, artifact: Artifact, on_server: Path) -> Iterator[str]:
    try:
        arguments = read_json(version / ENGINE_FILE)
    except SlipwayError as error:
        yield str(error)
        return
    if not isinstance(arguments, dict):
        yield f"{ENGINE_FILE}: expected an object of engine arguments, found {ascii(arguments)[:40]}"
        return
    for what, place in server_paths(on_server).items():
        if arguments.get(what) != place:
            yield (
                f"{ENGINE_FILE}: expected {what} '{place}', found '{arguments.get(what)}'; "
                "export again, with --mounted-at if a container reads it elsewhere"
            )
    embeds = task_of(artifact) == "embed"
    if (arguments.get("runner") == "pooling") != embeds:
        yield f"{ENGINE_FILE}: expected {'runner pooling' if embeds else 'no runner'}, found {arguments.get('runner')}"
    checkpoint = (f"{CHECKPOINT}/{name}" for name in ("config.json", *(EMBEDDING_FILES if embeds else ())))
    for name in (*checkpoint, f"{TOKENIZER}/tokenizer.json"):
        if name not in artifact.files:
            yield f"expected {name} in the manifest, found none"


BACKEND = Backend(
    name=NAME, file=ENGINE_FILE, takes_tensors=False, config=config, check=check, server_paths=server_paths
)
