"""The configs of the statement embedder, and the names and sizes that its tensors have."""

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
