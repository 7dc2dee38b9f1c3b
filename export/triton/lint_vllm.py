"""Checks an entry of Triton's vllm backend without a server: its config, and the arguments it hands to vLLM."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from export.triton.config import model_config
from export.triton.repository import places
from runtimes.artifact import Artifact, read_json
from runtimes.errors import SlipwayError, require
from runtimes.repository import number_of
from runtimes.vllm.artifact import CHECKPOINT, ENGINE_FILE, TOKENIZER, task_of

EMBEDDING_FILES = ("modules.json", "1_Pooling/config.json")


def check_entry(version: Path, artifact: Artifact, config: Any, mounted_at: Path) -> Iterator[str]:
    """One line for each thing by which NVIDIA's vllm backend would fail, or serve something else."""
    try:
        expected = model_config(artifact, "vllm")
    except SlipwayError as error:  # a manifest without a task
        yield str(error)
        return
    yield from _check_config(expected, config)
    yield from (f"version {version.name}, {line}" for line in _check_arguments(version, artifact, mounted_at))


def _check_config(text: str, config: Any) -> Iterator[str]:
    """Every setting that we write is as we write it; others are the user's."""
    schema = require("tritonclient.grpc.model_config_pb2", extra="client")
    parse = require("google.protobuf.text_format", extra="client").Parse
    expected = parse(text, schema.ModelConfig())
    if not config.model_transaction_policy.decoupled:
        yield "expected model_transaction_policy decoupled, as tokens come one by one, found none"
    if config.max_batch_size:
        yield f"expected max_batch_size 0, for vLLM makes the batches, found {config.max_batch_size}"
    group = expected.instance_group[0]
    found = [(each.count or 1, each.kind) for each in config.instance_group]
    if found != [(group.count, group.kind)]:
        yield "expected one instance group of KIND_MODEL with count 1, for vLLM picks the devices, found another"
    for what in ("input", "output"):
        own = {each.name: each.SerializeToString() for each in getattr(config, what)}
        for each in getattr(expected, what):
            if own.get(each.name) != each.SerializeToString():
                found_one = "another" if each.name in own else "none"
                yield f"{what} '{each.name}': expected it as the vllm backend has it, found {found_one}"


def _check_arguments(version: Path, artifact: Artifact, mounted_at: Path) -> Iterator[str]:
    try:
        arguments = read_json(version / ENGINE_FILE)
    except SlipwayError as error:
        yield str(error)
        return
    if not isinstance(arguments, dict):
        yield f"{ENGINE_FILE}: expected an object of engine arguments, found {ascii(arguments)[:40]}"
        return
    for what, place in places(artifact, mounted_at, number_of(version)).items():
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
