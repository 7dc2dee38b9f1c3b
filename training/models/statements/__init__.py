"""Statement embeddings: theorem-like statements of a paper lie close (contrastive LoRA, frozen language model)."""

from training.models.statements.spec import SPECS

__all__ = ["SPECS"]
