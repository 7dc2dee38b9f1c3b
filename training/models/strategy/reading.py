"""What the frozen parts have to read of the samples, and under which names a store keeps it."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from runtimes.cache.store import Store
from runtimes.pipelines.strategy.dialogue import Dialogue
from runtimes.pipelines.strategy.discourse import (
    PAIR_TOKENS,
    best_trees,
    pair_tensors,
    pair_tokens,
    parser_dialogue,
    parser_text,
)
from runtimes.text_pipeline import Tokens
from training.frozen import digest
from training.models.strategy.discourse import load_parser
from training.models.strategy.frozen import (
    EmotionClassifier,
    TextEncoder,
    load_classifier,
    load_encoder,
    sha256_bytes,
    tokenizer_json,
)
from training.precompute import fill
from training.spec import Config, FrozenInference

CONTEXT, EMOTION, DISCOURSE = "context", "emotion", "discourse"


def tokenizers(config: Config) -> dict[str, bytes]:
    """tokenizer.json of each part that reads text."""
    result = {
        CONTEXT: tokenizer_json(config["encoder"], config["encoder_revision"]),
        EMOTION: tokenizer_json(config["emotion_model"], config["emotion_revision"]),
    }
    if config["parser"] == "sddp":
        result[DISCOURSE] = tokenizer_json(config["parser_model"], "main")
    return result


def identities(config: Config) -> dict[str, Any]:
    """What an entry depends on besides its text, by shelf. Serving reads the same from the artifact's assets."""
    named = {part: sha256_bytes(data) for part, data in tokenizers(config).items()}
    result = {
        CONTEXT: {
            "model": digest(load_encoder(config["encoder"], config["encoder_revision"])),
            "tokenizer": named[CONTEXT],
            "max_tokens": config["max_tokens"],
            "pooling": config["pooling"],
            "precision": "fp32",
        },
        EMOTION: {
            "model": digest(load_classifier(config["emotion_model"], config["emotion_revision"])),
            "tokenizer": named[EMOTION],
            "max_tokens": config["turn_tokens"],
            "precision": "fp32",
        },
    }
    if DISCOURSE in named:
        result[DISCOURSE] = {
            "model": digest(load_parser(config["parser_model"])),
            "tokenizer": named[DISCOURSE],
            "max_tokens": PAIR_TOKENS,
            "precision": "fp32",
        }
    return result


def tokens(config: Config) -> tuple[Tokens, Tokens]:
    """How contexts and how turns become token ids."""
    files = tokenizers(config)
    return Tokens(files[CONTEXT], config["max_tokens"]), Tokens(files[EMOTION], config["turn_tokens"])


def frozen_inferences(config: Config, dialogues: Sequence[Dialogue]) -> list[FrozenInference]:
    """Every context; the turns whose emotion is not given; with a parser, the dialogues whose edges are not."""
    identity = identities(config)
    files = tokenizers(config)
    encoder = TextEncoder(config["encoder"], config["encoder_revision"], config["pooling"])
    classifier = EmotionClassifier(config["emotion_model"], config["emotion_revision"])
    contexts = [dialogue.context for dialogue in dialogues]
    turns = [turn.text for dialogue in dialogues if dialogue.emotion_logits is None for turn in dialogue.turns]
    result = [
        _text_reading(CONTEXT, identity[CONTEXT], contexts, encoder, files[CONTEXT]),
        _text_reading(EMOTION, identity[EMOTION], turns, classifier, files[EMOTION]),
    ]
    if DISCOURSE in identity:
        parser = load_parser(config["parser_model"])
        result.append(_discourse_reading(identity[DISCOURSE], dialogues, parser, files[DISCOURSE]))
    return result


def complete(config: Config, dialogues: Sequence[Dialogue], store: Store, *, read: bool) -> "Known":
    """What the frozen parts say to these dialogues: read now if `read`, else all of it must be in the store."""
    found = {}
    for reading in frozen_inferences(config, dialogues):
        if read:
            fill(store, reading)
        remedy = "run python -m training.precompute strategy with the same data, settings and store"
        entries = store.namespace(reading.namespace, reading.identity).require(reading.texts, remedy)
        found[reading.namespace] = dict(zip(reading.texts, entries, strict=True))
    return Known(found)


class Known:
    """What the frozen parts said, by shelf and text."""

    def __init__(self, entries: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        self.entries = entries

    def contexts(self, dialogues: Sequence[Dialogue]) -> np.ndarray:
        """float32 [dialogues, width]"""
        return np.stack([self.entries[CONTEXT][dialogue.context] for dialogue in dialogues])

    def complete(self, dialogue: Dialogue) -> Dialogue:
        """The dialogue with emotions, and with edges if a parser read it."""
        if dialogue.emotion_logits is None:
            dialogue = dialogue.with_emotions([self.entries[EMOTION][turn.text] for turn in dialogue.turns])
        if dialogue.edges is None and DISCOURSE in self.entries:
            dialogue = dialogue.with_edges(self.entries[DISCOURSE][parser_text(dialogue)])
        return dialogue


def _text_reading(
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
    """The model where it is to run; on a GPU a copy, as others in this process share the one on the CPU."""
    if not torch.cuda.is_available():
        return model, torch.device("cpu")
    device = torch.device("cuda")
    return copy.deepcopy(model).to(device), device


def _discourse_reading(
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
