"""Statement embeddings: theorem-like statements of one paper lie close (contrastive LoRA over a frozen language model)."""

from training.models.statements.spec import SPECS

__all__ = ["SPECS"]
