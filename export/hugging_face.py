"""A language model as a folder for Hugging Face, sentence-transformers and vLLM."""

from pathlib import Path
from typing import TYPE_CHECKING

from runtimes.artifact import read_json, write_json
from training.language_model import LanguageModel

if TYPE_CHECKING:
    import torch
    from torch import nn

POOLING, DENSE, NORMALIZE = "1_Pooling", "2_Dense", "3_Normalize"
# The names of our poolings in sentence-transformers.
MODES = {"mean": "pooling_mode_mean_tokens", "last": "pooling_mode_lasttoken", "cls": "pooling_mode_cls_token"}
IDENTITY = "torch.nn.modules.linear.Identity"


def write_tokenizer(language_model: LanguageModel, folder: Path) -> None:
    language_model.tokenizer.model_max_length = language_model.window
    language_model.tokenizer.save_pretrained(folder)


def write_embedding_modules(language_model: LanguageModel, folder: Path) -> None:
    """Pooling, projection and normalisation in the layout of sentence-transformers."""
    width, projection = language_model.model.config.hidden_size, language_model.projection
    kinds = [("", "Transformer"), (POOLING, "Pooling"), (DENSE, "Dense"), (NORMALIZE, "Normalize")]
    if projection is None:
        kinds.remove((DENSE, "Dense"))
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    for path, _ in kinds[1:]:
        (folder / path).mkdir()
    write_json(folder / "modules.json", modules)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": language_model.window, "do_lower_case": False})
    modes = {name: how == language_model.pooling for how, name in MODES.items()}
    write_json(folder / POOLING / "config.json", {"word_embedding_dimension": width, **modes})
    if projection is not None:
        _write_dense(projection, folder / DENSE)


def _write_dense(projection: "nn.Linear", folder: Path) -> None:
    from safetensors.torch import save_file

    sizes = {"in_features": projection.in_features, "out_features": projection.out_features}
    biased = projection.bias is not None
    write_json(folder / "config.json", {**sizes, "bias": biased, "activation_function": IDENTITY})
    tensors = {f"linear.{name}": tensor.detach().contiguous() for name, tensor in projection.named_parameters()}
    save_file(tensors, folder / "model.safetensors")


def store_as(folder: Path, dtype: "torch.dtype") -> None:
    """The float32 tensors of a model's files become `dtype`, which its config then names, in place."""
    import torch
    from safetensors.torch import load_file, save_file

    for path in folder.glob("*.safetensors"):
        kept = load_file(path)
        cast = {name: tensor.to(dtype) if tensor.dtype == torch.float32 else tensor for name, tensor in kept.items()}
        save_file(cast, path, metadata={"format": "pt"})
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", {**config, "dtype": str(dtype).removeprefix("torch.")})
