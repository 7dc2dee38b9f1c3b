"""Files, inputs and outputs of an artifact for vLLM, as export, engine and Triton's backend share them.

    checkpoint/     a whole Hugging Face folder: config, weights, tokenizer, generation config; where it embeds also the
                    modules of sentence-transformers (modules.json, 1_Pooling, 2_Dense, 3_Normalize)
    tokenizer/      tokenizer.json and tokenizer_config.json once more, without a config.json: where transformers 5
                    has the model's type, such as qwen2, it builds that type's own tokenizer and reads no more than
                    the vocabulary, and a text has other tokens than in our pipelines
    model.json      arguments of vLLM's AsyncEngineArgs, as NVIDIA's Triton backend reads them; its `model` and
                    `tokenizer` are the places of these folders in that server, ours are always the ones beside it
    artifact.json   the manifest, whose `built_with` has the `task`: "generate" or "embed"

Inputs are `input_ids` and `attention_mask`, int64 [batch, tokens], padded on either side.

    embed           one output, float32 [batch, width]
    generate        `token_logprobs` float32 [batch, tokens], of each token given those before it, in nats;
                    `next_ids` int64 [batch, tokens], the likeliest token after each. Both are 0 at padding, and the
                    first token of a row has the logprob 0, for no token precedes it
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.artifact import Artifact, read_json
from runtimes.errors import ArtifactError, InputError

CHECKPOINT, TOKENIZER = "checkpoint", "tokenizer"
ENGINE_FILE = "model.json"
TASK = "task"
TASKS = ("generate", "embed")
TOKEN_LOGPROBS, NEXT_IDS = "token_logprobs", "next_ids"


def task_of(artifact: Artifact) -> str:
    """The task of the model; `ArtifactError` if its manifest has none."""
    task = artifact.built_with.get(TASK)
    if task not in TASKS:
        raise ArtifactError(f"{artifact.name}: expected a task of {', '.join(TASKS)}, found {task}; export it again")
    return task


def engine_arguments(version: Path) -> dict[str, Any]:
    """The arguments in model.json, with the checkpoint and the tokenizer beside it where there are such folders."""
    arguments = read_json(version / ENGINE_FILE)
    if not isinstance(arguments, dict) or "model" not in arguments:
        raise ArtifactError(f"{version / ENGINE_FILE}: expected an object with a 'model', found none; export it again")
    places = {name: version.absolute() / folder for name, folder in (("model", CHECKPOINT), ("tokenizer", TOKENIZER))}
    return {**arguments, **{name: str(folder) for name, folder in places.items() if folder.is_dir()}}


def real_rows(inputs: Mapping[str, np.ndarray]) -> list[list[int]]:
    """The token ids of every row without its padding; `InputError` for a row of nothing else."""
    mask = inputs["attention_mask"].astype(bool)
    rows: list[list[int]] = [ids[real].tolist() for ids, real in zip(inputs["input_ids"], mask, strict=True)]
    if not all(rows):
        raise InputError("expected at least one real token in every row, found a row of padding")
    return rows
