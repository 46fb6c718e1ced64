"""What a manifest says beside its shards, as frozen values, and the commit itself: no live worker, no collectives."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from cluster.storage import Store
from tasks.checkpoints.groups import group_names
from tasks.checkpoints.manifest import (
    STATE_KEY,
    LossStatistics,
    Manifest,
    Shard,
    SideFile,
    model_digest,
    state_digest,
)
from tasks.checkpoints.run_folder import code_version
from tasks.checkpoints.writer import commit_manifest, write_side_files


@dataclass(frozen=True, kw_only=True)
class SnapshotFacts:
    """Taken at the step that is published, so that a later commit need not look at the worker, which trains on."""

    key: str
    """Folder below the run, as :func:`tasks.checkpoints.run_folder.snapshot_key` names it."""
    step: int
    """Completed optimizer steps."""
    tokens_seen: int
    """Tokens of those steps."""
    phase: Literal["warmup", "stable", "decay"]
    """Phase of the schedule."""
    learning_rate: float
    """Of the last step."""
    loss: LossStatistics
    """Since the previous snapshot on the grid of intervals."""
    scalars: Mapping[str, Any]
    """What ``state.json`` holds; plain JSON values without wall-clock time, for they are part of the state's digest."""
    files: Mapping[str, bytes]
    """Small files beside the shards by key, ``state.json`` and the index excepted."""
    run_id: str
    """Run that is trained."""
    segment: int
    """Segment that is trained."""
    recovery: int = 0
    """Recoveries in force."""
    ephemeral: bool = False
    """Whether it is there to resume from alone."""
    created: float = field(default_factory=time.time)
    """Unix seconds when the state was taken."""


def commit_snapshot(store: Store, facts: SnapshotFacts, shards: tuple[Shard, ...], check: Callable[[], None]) -> None:
    """Write side files, then publish the manifest of ``shards``, those of all ranks in the order of ranks.

    ``store`` is rooted at the snapshot's folder. ``check`` raises if the lease was lost and is asked right before each of the
    two. Safe to run again after a :class:`cluster.errors.StorageError`: the same content committed twice is success, other
    content under the same key is :class:`tasks.checkpoints.writer.CommitConflict`.
    """
    contents = {**facts.files, STATE_KEY: json.dumps(facts.scalars, indent=1).encode()}
    files = write_side_files(store, contents, shards, check)
    commit_manifest(store, _manifest(facts, shards, files), check)


def _manifest(facts: SnapshotFacts, shards: tuple[Shard, ...], files: tuple[SideFile, ...]) -> Manifest:
    return Manifest(
        kind="training",
        step=facts.step,
        tokens_seen=facts.tokens_seen,
        digest=model_digest(shards),
        state_digest=state_digest(shards, dict(facts.scalars)),
        shards=shards,
        files=files,
        parameter_groups=group_names(sorted(t.name for s in shards if s.part == "model" for t in s.tensors)),
        phase=facts.phase,
        learning_rate=facts.learning_rate,
        loss=facts.loss,
        healthy=facts.loss.healthy,
        run_id=facts.run_id,
        segment=facts.segment,
        recovery=facts.recovery,
        ephemeral=facts.ephemeral,
        code_version=code_version(),
        created=facts.created,
    )
