"""What the functions of a pipeline's steps work with."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.lease import Lease
from configs.schema import Config
from pipelines.beside import Beside
from tasks.checkpoints.run_folder import RunFolder
from tasks.checkpoints.start_point import StartPoint


@dataclass(frozen=True, kw_only=True)
class Driven:
    """A run and what its driver holds."""

    run: RunFolder
    """The run."""
    config: Config
    """Its configuration."""
    start: StartPoint | None = None
    """Where the run was or will be forked from, or whose weights it begins with."""
    lease: Lease | None = None
    """Held by this driver; None for whoever only looks."""
    beside: Beside | None = None
    """Merges and evaluations that go on beside training."""
