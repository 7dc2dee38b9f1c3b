"""Collections of vectors: writer, exact search, index; python -m runtimes.search."""
