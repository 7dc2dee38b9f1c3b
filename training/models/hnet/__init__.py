"""H-Net: a byte language model that learns where its segments begin."""

from training.models.hnet.spec import SPECS

__all__ = ["SPECS"]
