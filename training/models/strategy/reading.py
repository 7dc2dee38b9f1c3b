"""The outputs of the frozen parts for all samples, from a store or computed now."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from runtimes.cache.store import Store
from runtimes.pipelines.strategy.dialogue import Dialogue
from runtimes.pipelines.strategy.discourse import (
    best_trees,
    pair_tensors,
    pair_tokens,
    parser_dialogue,
    parser_text,
)
from runtimes.text_pipeline import Tokens
from training.config import Config
from training.frozen_store import FrozenInference, fill
from training.models.strategy.discourse import load_parser
from training.models.strategy.frozen import EmotionClassifier, TextEncoder
from training.models.strategy.identities import CONTEXT, DISCOURSE, EMOTION, identities, tokenizers


def frozen_inferences(config: Config, dialogues: Sequence[Dialogue]) -> list[FrozenInference]:
    """Every context; the turns without given emotions; with a parser, the dialogues without given edges."""
    identity = identities(config)
    files = tokenizers(config)
    encoder = TextEncoder(config["encoder"], config["encoder_revision"], config["pooling"])
    classifier = EmotionClassifier(config["emotion_model"], config["emotion_revision"])
    contexts = [dialogue.context for dialogue in dialogues]
    turns = [turn.text for dialogue in dialogues if dialogue.emotion_logits is None for turn in dialogue.turns]
    result = [
        _text_inference(CONTEXT, identity[CONTEXT], contexts, encoder, files[CONTEXT]),
        _text_inference(EMOTION, identity[EMOTION], turns, classifier, files[EMOTION]),
    ]
    if DISCOURSE in identity:
        parser = load_parser(config["parser_model"])
        result.append(_discourse_inference(identity[DISCOURSE], dialogues, parser, files[DISCOURSE]))
    return result


def complete(config: Config, dialogues: Sequence[Dialogue], store: Store, *, read: bool) -> "FrozenOutputs":
    """The frozen parts' outputs for these dialogues: computed now if `read`, else all must be in the store."""
    found = {}
    for inference in frozen_inferences(config, dialogues):
        if read:
            fill(store, inference)
        remedy = "run python -m training.precompute strategy with the same data, settings and store"
        entries = store.namespace(inference.namespace, inference.identity).require(inference.texts, remedy)
        found[inference.namespace] = dict(zip(inference.texts, entries, strict=True))
    return FrozenOutputs(found)


class FrozenOutputs:
    """Outputs of the frozen parts, by namespace and text."""

    def __init__(self, entries: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        self.entries = entries

    def contexts(self, dialogues: Sequence[Dialogue]) -> np.ndarray:
        """float32 [dialogues, width]"""
        return np.stack([self.entries[CONTEXT][dialogue.context] for dialogue in dialogues])

    def complete(self, dialogue: Dialogue) -> Dialogue:
        """The dialogue with emotions, and with the parser's edges if there is a parser."""
        if dialogue.emotion_logits is None:
            dialogue = dialogue.with_emotions([self.entries[EMOTION][turn.text] for turn in dialogue.turns])
        if dialogue.edges is None and DISCOURSE in self.entries:
            dialogue = dialogue.with_edges(self.entries[DISCOURSE][parser_text(dialogue)])
        return dialogue


def _text_inference(
    namespace: str, identity: Mapping[str, Any], texts: Sequence[str], model: nn.Module, tokenizer: bytes
) -> FrozenInference:
    own = Tokens(tokenizer, identity["max_tokens"])
    placed, device = _placed(model)

    def run(batch: Sequence[str]) -> list[np.ndarray]:
        with torch.inference_mode():
            ids = torch.from_numpy(own.ids(batch)).to(device)
            return list(placed(ids).cpu().numpy())

    return FrozenInference(namespace=namespace, identity=identity, texts=texts, lengths=own.lengths, run=run)


def _placed(model: nn.Module) -> tuple[nn.Module, torch.device]:
    """The model on its device; on a GPU a copy, because the one on the CPU is shared in this process."""
    if not torch.cuda.is_available():
        return model, torch.device("cpu")
    device = torch.device("cuda")
    return copy.deepcopy(model).to(device), device


def _discourse_inference(
    identity: Mapping[str, Any], dialogues: Sequence[Dialogue], parser: nn.Module, tokenizer: bytes
) -> FrozenInference:
    tokens = pair_tokens(tokenizer)
    placed, device = _placed(parser)

    def run(batch: Sequence[str]) -> list[np.ndarray]:
        unparsed = [parser_dialogue(text) for text in batch]
        with torch.inference_mode():
            arrays = pair_tensors(unparsed, tokens).values()
            scores = placed(*(torch.from_numpy(array).to(device) for array in arrays)).cpu().numpy()
        return best_trees(scores)

    def lengths(texts: Sequence[str]) -> list[int]:
        return [pair_tensors([parser_dialogue(text)], tokens)["pair_ids"].size for text in texts]

    texts = [parser_text(dialogue) for dialogue in dialogues if dialogue.edges is None]
    return FrozenInference(namespace=DISCOURSE, identity=identity, texts=texts, lengths=lengths, run=run)
