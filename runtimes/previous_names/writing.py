"""`runtimes.pipelines.hnet.generation` under its name before 0.2: published steps that write texts import it."""

from runtimes.pipelines.hnet.generation import ContinuousBatcher as Desk
from runtimes.pipelines.hnet.generation import Writing
from runtimes.pipelines.hnet.generation import read_generation_request as read_wish
from runtimes.text_pipeline import piece

__all__ = ["Desk", "Writing", "piece", "read_wish"]
