"""Take ephemeral snapshots away once they are of no use, whatever retention says of the others.

They come every few minutes for weeks, so whoever drives a run calls this now and then; `pma gc --apply` does the same and more.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from configs.merging import RetentionConfig
from tasks.checkpoints.collect import collect
from tasks.checkpoints.dependents import read_dependents, reasons_of_dependents
from tasks.checkpoints.dooms import without_gone
from tasks.checkpoints.pins import pins_in_force
from tasks.checkpoints.retention import (
    Holdings,
    RetentionPlan,
    join_reasons,
    plan_retention,
    reasons_of_segments,
    reasons_of_starts,
)
from tasks.checkpoints.run_folder import RUN_KEY, RunFolder

EVERYTHING_ELSE_STAYS = RetentionConfig()


def drop_ephemeral(run: RunFolder, *, clock: Callable[[], float] = time.time) -> list[str]:
    """Take away the ephemeral snapshots of ``run`` that have a later snapshot and that nobody needs; their folders below it.

    Needed are what is pinned, and where open segments, branches and dependent runs began. Costs two listings if there is nothing to take.
    Raises :class:`cluster.errors.LeaseHeld` if a collection is at work already.
    """
    if not any(row.action == "delete" for row in _survey(run, clock()).rows):
        return []
    done = collect(run.store, lambda: _survey(run, clock()), clock=clock)
    return [doom.name for doom in done.collected]


def _survey(run: RunFolder, now: float) -> RetentionPlan:
    # Pins before everything else, as `pma gc` reads them: who lets one go has made what can then be seen.
    pins = pins_in_force(run.store, now)
    look = run.look()
    snapshots = without_gone(run.store, look.snapshots())
    left = without_gone(run.store, look.left_behind())
    branches = {name: run.branch(name) for name in run.branches() if run.branch(name).store.exists(RUN_KEY)}
    starts = {name: start for name, branch in branches.items() if (start := branch.identity().start)}
    holdings = [(f"snapshots/{glance.url.rsplit('/', 1)[1]}", glance) for glance in (*snapshots, *left)]
    needed = join_reasons(
        {name: [f"pinned by {owner}"] for name, owner in pins.items()},
        reasons_of_starts(starts, holdings),
        reasons_of_dependents(read_dependents(run.store)),
        reasons_of_segments(run.segments(), snapshots),
    )
    return plan_retention(
        Holdings(snapshots=tuple(snapshots), merged={}, needed=needed, surplus=(), left_behind=tuple(left)),
        EVERYTHING_ELSE_STAYS,
        interval_tokens=1,
        now=now,
    )
