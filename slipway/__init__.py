"""Slipway: verified conversion, serving and measurement of trained models.

    import slipway

    with slipway.load("policy_gru") as model:
        answer = model.predict(request)

`import slipway` imports neither NumPy nor an engine; the first use of `load` or `Model` does.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slipway.model import Model, load

__version__ = "0.2.0"
__all__ = ["Model", "__version__", "load"]


def __getattr__(name: str) -> Any:
    if name in ("Model", "load"):
        return getattr(importlib.import_module("slipway.model"), name)
    raise AttributeError(f"module 'slipway' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
