"""Content-addressed store of the outputs of frozen models."""
