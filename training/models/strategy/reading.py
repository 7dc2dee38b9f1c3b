"""What the frozen parts have to read of the samples, and under which names a store keeps it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from runtimes.caching import Store
from runtimes.dialogue import Dialogue
from runtimes.texts import Tokens
from training.models.strategy import discourse
from training.models.strategy.frozen import (
    EmotionClassifier,
    TextEncoder,
    digest,
    load_classifier,
    load_encoder,
    sha256_bytes,
    tokenizer_json,
)
from training.precompute import fill
from training.spec import Config, Reading

CONTEXT, EMOTION, DISCOURSE = "context", "emotion", "discourse"


def tokenizers(config: Config) -> dict[str, bytes]:
    """tokenizer.json of each part that reads text."""
    return {
        CONTEXT: tokenizer_json(config["encoder"], config["encoder_revision"]),
        EMOTION: tokenizer_json(config["emotion_model"], config["emotion_revision"]),
    }


def identities(config: Config) -> dict[str, Any]:
    """What an entry depends on besides its text, by shelf. Serving reads the same from the artifact's assets."""
    named = {part: sha256_bytes(data) for part, data in tokenizers(config).items()}
    return {
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


def tokens(config: Config) -> tuple[Tokens, Tokens]:
    """How contexts and how turns become token ids."""
    files = tokenizers(config)
    return Tokens(files[CONTEXT], config["max_tokens"]), Tokens(files[EMOTION], config["turn_tokens"])


def readings(config: Config, dialogues: Sequence[Dialogue]) -> list[Reading]:
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
    if config["parser"] == "sddp":
        result.append(_discourse_reading(config, dialogues))
    return result


def complete(config: Config, dialogues: Sequence[Dialogue], store: Store, *, read: bool) -> "Known":
    """What the frozen parts say to these dialogues: read now if `read`, else all of it must be in the store."""
    found = {}
    for reading in readings(config, dialogues):
        if read:
            fill(store, reading)
        remedy = "run python -m training.precompute strategy with the same data, settings and store"
        entries = store.shelf(reading.shelf, reading.identity).require(reading.texts, remedy)
        found[reading.shelf] = dict(zip(reading.texts, entries, strict=True))
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
        logits, edges = dialogue.emotion_logits, dialogue.edges
        if logits is None:
            logits = np.stack([self.entries[EMOTION][turn.text] for turn in dialogue.turns])
        if edges is None and DISCOURSE in self.entries:
            parsed = self.entries[DISCOURSE][discourse_text(dialogue)]
            edges = tuple((int(head), int(tail), int(kind)) for head, tail, kind in parsed)
        return Dialogue(turns=dialogue.turns, edges=edges, emotion_logits=logits)


def discourse_text(dialogue: Dialogue) -> str:
    """A dialogue as the parser reads it."""
    return json.dumps([[turn.speaker, turn.text] for turn in dialogue.turns], ensure_ascii=False)


def _text_reading(
    shelf: str, identity: Mapping[str, Any], texts: Sequence[str], model: nn.Module, tokenizer: bytes
) -> Reading:
    own = Tokens(tokenizer, identity["max_tokens"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def ask(batch: Sequence[str]) -> list[np.ndarray]:
        with torch.inference_mode():
            ids = torch.from_numpy(own.ids(batch)).to(device)
            return list(model.to(device)(ids).cpu().numpy())

    return Reading(shelf=shelf, identity=identity, texts=texts, lengths=own.lengths, ask=ask)


def _discourse_reading(config: Config, dialogues: Sequence[Dialogue]) -> Reading:
    parser = discourse.load_parser(config["parser_model"], "main")
    tokenizer = tokenizer_json(config["parser_model"], "main")
    pairs = Tokens(tokenizer, discourse.PAIR_TOKENS)
    unparsed = [discourse_text(dialogue) for dialogue in dialogues if dialogue.edges is None]

    def ask(batch: Sequence[str]) -> list[np.ndarray]:
        return [parser.parse(json.loads(text), pairs) for text in batch]

    return Reading(
        shelf=DISCOURSE,
        identity={"model": digest(parser), "tokenizer": sha256_bytes(tokenizer), "max_tokens": discourse.PAIR_TOKENS},
        texts=unparsed,
        lengths=lambda texts: [len(text) for text in texts],
        ask=ask,
    )
