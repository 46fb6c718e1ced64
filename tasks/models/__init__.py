"""Networks by family name, and how their tensors are named on disk."""
