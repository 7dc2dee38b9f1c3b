"""`runtimes.triton.request_queue` under its name before 0.2: published steps that write texts import it."""

from runtimes.triton.request_queue import Limits
from runtimes.triton.request_queue import RequestQueue as WaitingLine

__all__ = ["Limits", "WaitingLine"]
