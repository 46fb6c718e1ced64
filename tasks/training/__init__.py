"""Training of one segment, as every worker of the gang runs it."""
