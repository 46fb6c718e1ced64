"""Where a gang goes on: decided by rank 0 from committed manifests and recoveries alone, and told to the others."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tasks.checkpoints.manifest import STATE_KEY
from tasks.checkpoints.reader import Checkpoint
from tasks.checkpoints.recoveries import Recovery
from tasks.checkpoints.run_folder import RunFolder
from tasks.checkpoints.start_point import StartPoint


@dataclass(frozen=True, kw_only=True)
class ResumePoint:
    """A checkpoint to begin with, and the recovery that is in force."""

    url: str | None
    """Checkpoint to restore; None for fresh weights."""
    with_moments: bool
    """Whether Adam's moments are restored with the weights."""
    recovery: Recovery | None
    """The newest recovery; it decides learning rate and data from here on."""
    initial: StartPoint | None = None
    """The start of a run that initialises from weights, while nothing of its own is committed yet."""


def find_resume_point(run: RunFolder) -> ResumePoint:
    """The newest snapshot that no recovery left behind; before there is one, the start of the recovery or of the run."""
    look = run.look()
    last = look.recoveries[-1] if look.recoveries else None
    snapshots = look.snapshots()
    if last is not None and (not snapshots or snapshots[-1].recovery < last.number):
        return ResumePoint(url=last.start.url, with_moments=last.moments != "reset", recovery=last)
    if snapshots:
        return ResumePoint(url=snapshots[-1].url, with_moments=True, recovery=last)
    start = run.identity().start
    if start is not None and start.weights_only:
        return ResumePoint(url=start.url, with_moments=False, recovery=last, initial=start)
    return ResumePoint(url=start.url if start else None, with_moments=start is not None, recovery=last)


def read_scalars(checkpoint: Checkpoint) -> dict[str, Any]:
    """The scalar training state of ``checkpoint``; empty if it has none, as a merge whose moments were reset."""
    data = checkpoint.store.read_if_present(STATE_KEY)
    return dict(json.loads(data)) if data is not None else {}
