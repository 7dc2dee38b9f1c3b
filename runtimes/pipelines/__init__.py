"""One package per model family; each declares `PIPELINES`: subclasses of `runtimes.pipeline.Pipeline` by name."""
