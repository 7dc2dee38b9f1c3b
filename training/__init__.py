"""Middle floor: defines models, trains them, and writes checkpoints that hold only what was trained."""
