"""The merged base of an embedder as a causal language model, for engines that run language models."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from training.language_model import LanguageModel, NotADecoder, check_vocabulary, complete_tokenizer
from training.models.statements.base import is_encoder
from training.models.statements.tokenizer import tokenizer_json


def language_model(config: Mapping[str, Any], module: nn.Module, texts: Sequence[np.ndarray]) -> LanguageModel:
    """The decoder of a merged embedder with its pooling and projection.

    `NotADecoder` if the base is an encoder, `InputError` if the tokenizer does not fit the base.
    """
    base: Any = module.base
    if is_encoder(base):
        raise NotADecoder(f"not a decoder language model: {config['base']} is of the kind '{base.config.model_type}'")
    source, revision = config["base"], config["base_revision"]
    tokenizer = complete_tokenizer(tokenizer_json(source, revision), base.config, source, revision)
    check_vocabulary(source, tokenizer, base.config)
    return LanguageModel(
        model=causal(base),
        tokenizer=tokenizer,
        task="embed",
        window=config["max_tokens"],
        texts=texts,
        pooling=config["pooling"],
        projection=module.projection,  # type: ignore[arg-type]
    )


def causal(base: Any) -> Any:
    """`base` under the head of its family's causal model, whose output weights are the embeddings.

    `NotADecoder` if Hugging Face has no causal model of this family. Nothing is copied.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(base.config), None)
    if kind is None:
        raise NotADecoder(f"not a decoder language model: no causal model is of the kind '{base.config.model_type}'")
    config = copy.deepcopy(base.config)
    config.tie_word_embeddings = True
    with torch.device("meta"):
        model: Any = kind(config)
    setattr(model, model.base_model_prefix, base)
    model.tie_weights()
    return model.eval().requires_grad_(False)
