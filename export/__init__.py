"""Top floor: converts checkpoints, proves the result, and publishes it into a Triton model repository."""
