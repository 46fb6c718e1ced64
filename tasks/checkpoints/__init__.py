"""Checkpoints: manifests, the disk layout of tensors, and how both are written and read."""
