"""vLLM: its artifact, its process, its client."""
