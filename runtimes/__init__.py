"""Lowest layer: opens, runs, measures and serves converted models. Importing it needs numpy only, never torch."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtimes.runtime import open_runtime

__all__ = ["open_runtime"]
__path__.append(str(Path(__file__).parent / "previous_names"))


def __getattr__(name: str) -> Any:
    """`open_runtime`, imported at its first use: `import runtimes` alone stays free of numpy."""
    if name not in __all__:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    from runtimes.runtime import open_runtime

    return open_runtime
