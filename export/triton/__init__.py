"""The Triton side of an export: config.pbtxt, the model repository, and its linter."""
