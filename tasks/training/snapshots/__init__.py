"""Publishing a snapshot beside the next steps."""
