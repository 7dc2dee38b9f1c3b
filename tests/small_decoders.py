"""Two seeded decoders small enough for a CPU, as artifacts for vLLM, and what transformers says of the same weights."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from runtimes.artifact import ASSETS, Artifact, Facts, digests, write_json
from runtimes.engines.vllm import VllmRuntime
from runtimes.errors import MissingPackage
from runtimes.runtime import open_runtime
from runtimes.tensors import Axis, Signature, TensorSpec
from runtimes.vllm.artifact import CHECKPOINT, ENGINE_FILE, NEXT_IDS, TASK, TOKEN_LOGPROBS, TOKENIZER
from runtimes.vllm.server import find_python
from training.random_init import train_tokenizer

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, Qwen2Model

WIDTH, VECTOR_WIDTH = 128, 48
MAX_TOKENS, MAX_LENGTH = 32, 64
TEXTS = (
    "Let X be a scheme of finite type over a field. Then X is quasi-compact, and every point has a residue field.",
    "A ring is Noetherian if and only if every ideal of it is finitely generated; so is then a ring of polynomials.",
    "The bridge was opened in 1932. It is 1,149 metres long, and the tide below it turns four times a day.",
)
GEOMETRY = {
    "hidden_size": WIDTH, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": None,
    "eos_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
INPUTS = tuple(
    TensorSpec(name=name, dtype="int64", shape=("batch", "tokens")) for name in ("input_ids", "attention_mask")
)
AXES = (Axis(name="batch", min=1, opt=2, max=8), Axis(name="tokens", min=1, opt=8, max=MAX_TOKENS))
SCORES = (
    TensorSpec(name=TOKEN_LOGPROBS, dtype="float32", shape=("batch", "tokens")),
    TensorSpec(name=NEXT_IDS, dtype="int64", shape=("batch", "tokens")),
)
VECTOR = (TensorSpec(name="vector", dtype="float32", shape=("batch", VECTOR_WIDTH)),)


class Embedder(NamedTuple):
    """A decoder whose last state, projected and of unit length, is the vector of a text."""

    decoder: "Qwen2Model"
    projection: torch.Tensor

    def vector(self, ids: Sequence[int]) -> np.ndarray:
        with torch.inference_mode():
            last = self.decoder(torch.tensor([list(ids)])).last_hidden_state[0, -1]
        return torch.nn.functional.normalize(self.projection @ last, dim=0).numpy()


def write_tokenizer(folder: Path) -> int:
    """The size of the vocabulary of a tokenizer that `folder` now holds."""
    tokenizer = train_tokenizer(TEXTS, 384, ("<pad>",), single="$A")
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "TokenizersBackend"})
    return int(tokenizer.get_vocab_size())


def make_generator(folder: Path, **engine: object) -> "LlamaForCausalLM":
    """A Llama as an artifact in `folder`; its logits are spread far apart, so that two engines choose alike."""
    from transformers import LlamaConfig, LlamaForCausalLM

    checkpoint = folder / CHECKPOINT
    checkpoint.mkdir(parents=True)
    torch.manual_seed(0)
    module = LlamaForCausalLM(LlamaConfig(vocab_size=write_tokenizer(checkpoint), **GEOMETRY)).eval()
    torch.nn.init.normal_(module.model.embed_tokens.weight)
    torch.nn.init.normal_(module.lm_head.weight, std=0.2)
    module.save_pretrained(checkpoint)
    finish(folder, "generate", "generator", SCORES, {"dtype": "float32", **engine})
    return module


def make_embedder(folder: Path, **engine: object) -> Embedder:
    """A Qwen2 with the pooling of its last token, a projection and unit length as an artifact in `folder`."""
    from transformers import Qwen2Config, Qwen2Model

    checkpoint = folder / CHECKPOINT
    checkpoint.mkdir(parents=True)
    torch.manual_seed(1)
    module = Qwen2Model(Qwen2Config(vocab_size=write_tokenizer(checkpoint), **GEOMETRY)).eval()
    torch.nn.init.normal_(module.embed_tokens.weight)
    module.save_pretrained(checkpoint)
    projection = torch.randn(VECTOR_WIDTH, WIDTH) / WIDTH**0.5
    write_sentence_transformer(checkpoint, projection)
    finish(folder, "embed", "embedder", VECTOR, {"dtype": "float32", "runner": "pooling", **engine})
    return Embedder(module, projection)


def opened(folder: Path) -> VllmRuntime:
    """The artifact in `folder` in a real vLLM; the test is skipped with the reason where there is none."""
    try:
        find_python()
    except MissingPackage as error:
        pytest.skip(str(error))
    runtime = open_runtime(folder)
    assert isinstance(runtime, VllmRuntime)
    return runtime


def write_sentence_transformer(checkpoint: Path, projection: torch.Tensor) -> None:
    """The modules after the decoder in the files of sentence-transformers."""
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense", "3_Normalize": "Normalize"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds.items())
    ]
    write_json(checkpoint / "modules.json", modules)
    for path in filter(None, kinds):
        (checkpoint / path).mkdir()
    pooling = {"word_embedding_dimension": WIDTH, "pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}
    write_json(checkpoint / "1_Pooling" / "config.json", pooling)
    dense = {"in_features": WIDTH, "out_features": VECTOR_WIDTH, "bias": False}
    activation = {"activation_function": "torch.nn.modules.linear.Identity"}
    write_json(checkpoint / "2_Dense" / "config.json", {**dense, **activation})
    save_file({"linear.weight": projection.contiguous()}, checkpoint / "2_Dense" / "model.safetensors")


def finish(folder: Path, task: str, model: str, outputs: Sequence[TensorSpec], engine: dict[str, object]) -> None:
    """Arguments, assets and manifest of an artifact whose checkpoint lies there."""
    (folder / TOKENIZER).mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / CHECKPOINT / name, folder / TOKENIZER)
    arguments = {
        "model": CHECKPOINT,
        "tokenizer": TOKENIZER,
        "max_model_len": MAX_LENGTH,
        "enforce_eager": True,
        **engine,
    }
    write_json(folder / ENGINE_FILE, arguments)
    (folder / ASSETS).mkdir()
    (folder / ASSETS / "tokenizer.json").write_bytes((folder / CHECKPOINT / "tokenizer.json").read_bytes())
    Artifact(
        model=model,
        target="vllm",
        runtime="vllm",
        precision="fp32",
        pipeline={"generate": "hallucination_generator", "embed": "statements"}[task],
        config={"max_tokens": MAX_TOKENS},
        signature=Signature(inputs=INPUTS, outputs=tuple(outputs), axes=AXES),
        files=digests(folder),
        built_with={TASK: task},
        checkpoint="0" * 64,
        key="key",
        facts=Facts(built=True, deserialized=True, ran=True, compared=True),
    ).save(folder)


def row_inputs(lengths: Sequence[int], vocabulary: int = 300) -> dict[str, np.ndarray]:
    """Random rows of these lengths, padded on the right, but the last on the left."""
    longest = max(lengths)
    mask = np.arange(longest) < np.array(lengths)[:, None]
    mask[-1] = mask[-1, ::-1]
    ids = np.random.default_rng(0).integers(2, vocabulary, mask.shape)
    return {"input_ids": np.where(mask, ids, 0), "attention_mask": mask.astype(np.int64)}
