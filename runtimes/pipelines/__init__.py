"""One file per model; each declares `PIPELINE`, a subclass of `runtimes.pipeline.Pipeline`."""
