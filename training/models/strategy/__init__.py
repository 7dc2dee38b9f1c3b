"""Next supporter strategy of an emotional-support dialogue (EmoDynamiX), in English and Telugu."""

from training.models.strategy.spec import SPECS

__all__ = ["SPECS"]
