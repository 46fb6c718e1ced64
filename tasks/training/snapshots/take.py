"""Publish the gang's state as a snapshot: every rank writes its share, rank 0 commits the manifest."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from tasks.checkpoints.manifest import LossStatistics
from tasks.checkpoints.run_folder import snapshot_key
from tasks.training.schedule import phase_at, step_learning_rate
from tasks.training.sharding.rank_state import gather_share
from tasks.training.snapshots.board import open_board
from tasks.training.snapshots.facts import SnapshotFacts
from tasks.training.snapshots.flight import Terms
from tasks.training.snapshots.writer import SnapshotWriter

if TYPE_CHECKING:
    from tasks.training.worker import Worker


class LossWindow:
    """Loss and gradient norm of the steps since the previous snapshot on the grid of intervals.

    An ephemeral snapshot does not end a window; a segment that resumes from one takes over its statistics as ``carried``.
    """

    def __init__(self, carried: LossStatistics | None = None) -> None:
        self._carried = carried
        self._losses: list[float] = []
        self._norms: list[float] = []
        self._nonfinite = carried.nonfinite_steps if carried else 0

    def add(self, loss: float, gradient_norm: float) -> None:
        """Count one step."""
        if math.isfinite(loss) and math.isfinite(gradient_norm):
            self._losses.append(loss)
            self._norms.append(gradient_norm)
        else:
            self._nonfinite += 1

    def statistics(self) -> LossStatistics:
        """Summary for the manifest."""
        carried = self._carried
        before = carried.steps - carried.nonfinite_steps if carried else 0
        count = before + len(self._losses)
        loss, norm, maximum, last = sum(self._losses), sum(self._norms), list(self._losses), self._losses[-1:]
        if carried and before:
            loss += (carried.mean or 0.0) * before
            norm += (carried.gradient_norm_mean or 0.0) * before
            maximum.append(carried.maximum or 0.0)
            last = last or [carried.last or 0.0]
        return LossStatistics(
            mean=loss / count if count else None,
            maximum=max(maximum, default=None),
            last=last[0] if last else None,
            gradient_norm_mean=norm / count if count else None,
            steps=count + self._nonfinite,
            nonfinite_steps=self._nonfinite,
        )


def open_writer(worker: Worker, segment: int) -> SnapshotWriter:
    """The writer of this rank for ``segment``; every rank opens one."""
    board = open_board(worker.rank, worker.world_size, segment)
    return SnapshotWriter(worker.run.store, Terms(board=board, check_lease=worker.check_lease))


def begin_snapshot(
    worker: Worker, writer: SnapshotWriter, window: LossWindow, segment: int, *, ephemeral: bool = False
) -> Mapping[str, float]:
    """Collectively take the state of the step just completed and begin to publish it; what this cost the step, as metrics.

    Waits for the snapshot before, gathers host copies, and returns: upload and commit go on beside the next steps. Raises,
    on all ranks or on none, what :meth:`tasks.training.snapshots.writer.SnapshotWriter.wait` does.
    """
    started = time.perf_counter()
    waited = writer.wait()
    writer.warn_if_slow(waited)
    facts = facts_of(worker, window, segment, ephemeral=ephemeral)
    share = gather_share(worker.model, worker.rank, worker.world_size)
    writer.begin(share, facts)
    return {
        **writer.poll(),
        "snapshot/wait_seconds": waited,
        "snapshot/stall_seconds": time.perf_counter() - started,
    }


def facts_of(worker: Worker, window: LossWindow, segment: int, *, ephemeral: bool = False) -> SnapshotFacts:
    """What the manifest of the step just completed says beside its shards."""
    config = worker.config
    return SnapshotFacts(
        key=snapshot_key(worker.step, worker.recovery_number),
        step=worker.step,
        tokens_seen=worker.tokens_seen,
        phase=phase_at(config, worker.tokens_seen),
        learning_rate=step_learning_rate(config, worker.step, worker.course),
        loss=window.statistics(),
        scalars=worker.scalars(),
        files=worker.files,
        run_id=worker.identity.run_id,
        segment=segment,
        recovery=worker.recovery_number,
        ephemeral=ephemeral,
    )
