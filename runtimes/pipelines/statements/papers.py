"""`runtimes.search.papers` under its name before 0.2."""

from runtimes.search.papers import SIZES, Paper, Statement, read_papers

__all__ = ["SIZES", "Paper", "Statement", "read_papers"]
