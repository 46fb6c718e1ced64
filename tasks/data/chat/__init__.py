"""Data of supervised fine-tuning: rows with answers, made into sequences whose targets are the answers alone."""
