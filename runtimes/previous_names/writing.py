"""`runtimes.pipelines.hnet.generation` under its name before 0.2: published steps that write texts import it."""

from runtimes.pipelines.hnet.generation import Desk, Writing, piece, read_wish

__all__ = ["Desk", "Writing", "piece", "read_wish"]
