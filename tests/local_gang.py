"""Gangs and merges in this process, for tests."""

from pipelines.local_gang import local_means, run_tasks, start_gang, train

__all__ = ["local_means", "run_tasks", "start_gang", "train"]
