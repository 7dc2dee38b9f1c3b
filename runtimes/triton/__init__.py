"""Triton: client, server, watchers, and what runs inside the server (backends, steps)."""
