"""Text to token batches by index arithmetic."""
