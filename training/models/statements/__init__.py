"""Statement embeddings: those of one paper have similar vectors (contrastive LoRA, frozen language model)."""

from training.models.statements.spec import SPECS

__all__ = ["SPECS"]
