"""Ground floor: opens, runs, measures and serves converted models. Needs numpy only; never torch."""

from pathlib import Path

__path__.append(str(Path(__file__).parent / "previous_names"))
