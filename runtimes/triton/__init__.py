"""Triton: client, server, watchers, and the programs that run inside the server (backends, steps)."""
