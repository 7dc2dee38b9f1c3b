"""`runtimes.runtime` under its name before 0.2: published steps that write texts import it."""

from runtimes.runtime import Runtime, open_runtime

__all__ = ["Runtime", "open_runtime"]
