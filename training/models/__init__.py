"""One package per model; each declares `SPECS`, a tuple of `training.spec.ModelSpec`."""
