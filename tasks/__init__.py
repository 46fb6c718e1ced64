"""What one worker does: checkpoints, data, training, merging and evaluation."""
