"""Recurrent layers, each with one form per target."""
