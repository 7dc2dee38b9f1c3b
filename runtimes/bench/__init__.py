"""The benchmark suite: interleaved engines, each in a process of its own; python -m runtimes.bench."""
