"""What an artifact for vLLM holds and what it answers: where export, engine and Triton's backend agree.

    checkpoint/     a whole Hugging Face folder: config, weights, tokenizer, generation config; where it embeds also the
                    modules of sentence-transformers (modules.json, 1_Pooling, 2_Dense, 3_Normalize)
    model.json      arguments of vLLM's AsyncEngineArgs, as NVIDIA's Triton backend reads them; its `model` is the place
                    of checkpoint/ in that server, ours is always the folder beside it
    artifact.json   the manifest, whose `built_with` has the `task`: "generate" or "embed"

Inputs are `input_ids` and `attention_mask`, int64 [batch, tokens], padded on either side.

    embed           one output, float32 [batch, width]
    generate        `token_logprobs` float32 [batch, tokens], of each token given those before it, in nats;
                    `next_ids` int64 [batch, tokens], the likeliest token after each. Both are 0 at padding, and the
                    first token of a row has the logprob 0, for nothing stands before it
"""

from pathlib import Path
from typing import Any

from runtimes.artifact import Artifact, read_json
from runtimes.errors import ArtifactError

CHECKPOINT = "checkpoint"
ENGINE_FILE = "model.json"
TASK = "task"
TASKS = ("generate", "embed")
TOKEN_LOGPROBS, NEXT_IDS = "token_logprobs", "next_ids"


def task_of(artifact: Artifact) -> str:
    """What the model does; `ArtifactError` if its manifest does not say."""
    task = artifact.built_with.get(TASK)
    if task not in TASKS:
        raise ArtifactError(f"{artifact.name}: expected a task of {', '.join(TASKS)}, found {task}; export it again")
    return task


def engine_arguments(version: Path) -> dict[str, Any]:
    """The arguments in model.json, with the checkpoint beside it as the model."""
    arguments = read_json(version / ENGINE_FILE)
    if not isinstance(arguments, dict):
        raise ArtifactError(f"{version / ENGINE_FILE}: expected an object of engine arguments; export the model again")
    return {**arguments, "model": str((version / CHECKPOINT).absolute())}
