"""What happens after a loss spike: finding it in the logged losses and gradient norms (docs/spikes.md)."""
