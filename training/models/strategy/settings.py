"""The configs of the strategy models, and the sizes that their tensors may have."""

from runtimes.pipelines.strategy.dialogue import STRATEGIES
from training.config import Config

LAYERS = 3
BATCH_MAX = 16
CHOICES = {
    "labels": tuple(STRATEGIES),
    "emotion": ("mixed", "hard"),
    "parser": ("none", "sddp"),
    "pooling": ("cls", "mean"),
}
CONFIG: Config = {
    "labels": "esconv",
    "encoder": "FacebookAI/xlm-roberta-large",
    "encoder_revision": "main",
    "pooling": "cls",
    "emotion_model": "seeded:base",  # no seven-way classifier for Telugu is public: give your own
    "emotion_revision": "main",
    "emotion": "mixed",
    "parser": "none",
    "parser_model": "seeded:tiny",  # a folder with the public weights as safetensors, for --parser sddp
    "hg_dim": 512,
    "temperature": 0.5,
    "dropout": 0.1,
    "max_tokens": 256,
    "turn_tokens": 128,
    "max_turns": 32,
    "context_width": 1024,
}
TINY: Config = {
    **CONFIG,
    "encoder": "seeded:tiny",
    "pooling": "mean",
    "emotion_model": "seeded:tiny",
    "hg_dim": 64,
    "turn_tokens": 64,
    "max_turns": 16,
    "context_width": 64,
}
