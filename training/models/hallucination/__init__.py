"""Hallucination in retrieval-augmented answers, from how a language model reads its context (ReDeEP)."""

from training.models.hallucination.spec import SPECS

__all__ = ["SPECS"]
