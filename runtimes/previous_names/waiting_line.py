"""`runtimes.triton.request_queue` under its name before 0.2: published steps that write texts import it."""

from runtimes.triton.request_queue import Limits, WaitingLine

__all__ = ["Limits", "WaitingLine"]
