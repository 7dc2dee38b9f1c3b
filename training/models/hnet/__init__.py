"""H-Net: a byte language model with learned segments."""

from training.models.hnet.spec import SPECS

__all__ = ["SPECS"]
