"""Held-out loss of checkpoints."""
