"""Identities of the frozen parts: the digests and settings that their cached outputs depend on."""

from typing import Any

from runtimes.pipelines.strategy.discourse import PAIR_TOKENS
from runtimes.text_pipeline import Tokens
from training.config import Config
from training.frozen import digest
from training.models.strategy.discourse import load_parser
from training.models.strategy.frozen import load_classifier, load_encoder, sha256_bytes, tokenizer_json

CONTEXT, EMOTION, DISCOURSE = "context", "emotion", "discourse"


def tokenizers(config: Config) -> dict[str, bytes]:
    """The tokenizer.json of each part that reads text."""
    result = {
        CONTEXT: tokenizer_json(config["encoder"], config["encoder_revision"]),
        EMOTION: tokenizer_json(config["emotion_model"], config["emotion_revision"]),
    }
    if config["parser"] == "sddp":
        result[DISCOURSE] = tokenizer_json(config["parser_model"], "main")
    return result


def identities(config: Config) -> dict[str, Any]:
    """The dependencies of an entry besides its text, by namespace. Serving reads them from the artifact's assets."""
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
    """The tokenizers of contexts and of turns."""
    files = tokenizers(config)
    return Tokens(files[CONTEXT], config["max_tokens"]), Tokens(files[EMOTION], config["turn_tokens"])
