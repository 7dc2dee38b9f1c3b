"""Hallucination in retrieval-augmented answers, from the attention and the layers of a language model (ReDeEP)."""

from training.models.hallucination.spec import SPECS

__all__ = ["SPECS"]
