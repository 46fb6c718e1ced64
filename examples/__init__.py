"""Workloads that are not language models; each a folder of its own."""
