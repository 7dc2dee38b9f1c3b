"""The export layer: converts checkpoints, verifies the results and publishes them in a Triton model repository."""
