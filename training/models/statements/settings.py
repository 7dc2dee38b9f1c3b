"""The configs of the statement embedder, and the names and sizes that its tensors have."""

from typing import Any

from training.config import Config

BATCH_MAX = 32
PARITY_ROWS = 2 * BATCH_MAX
INPUTS = ("input_ids", "attention_mask")
TRAINED_ON = "training_"  # prefix of the names of the sample inputs that come from training papers
CONFIG: Config = {
    "base": "Qwen/Qwen2-1.5B",
    "base_revision": "main",
    "pooling": "last",
    "width": 2048,
    "max_tokens": 256,
    "lora_rank": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "lora_targets": "q_proj,k_proj,v_proj,o_proj",
}
TINY: Config = {**CONFIG, "base": "seeded:tiny", "pooling": "mean"}
# Sizes of a base with random weights, by the name after `seeded:`.
GEOMETRIES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 128, "vocab_size": 1024, "max_position_embeddings": 512,
    },
    "small": {
        "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "num_key_value_heads": 2,
        "intermediate_size": 1536, "vocab_size": 30_522, "max_position_embeddings": 1024,
    },
    "base": {
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 2,
        "intermediate_size": 3072, "vocab_size": 30_522, "max_position_embeddings": 1024,
    },
    "1.5b": {
        "hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
        "intermediate_size": 8960, "vocab_size": 151_936, "max_position_embeddings": 131_072,
    },
    "7b": {
        "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "intermediate_size": 18_944, "vocab_size": 152_064, "max_position_embeddings": 131_072,
    },
}  # fmt: skip
