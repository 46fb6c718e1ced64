"""A gang whose segment ended with a spike stays together until the driver has decided how to go on."""

from __future__ import annotations

import time

from tasks.training.rank_zero import told_by_rank_zero
from tasks.training.worker import Worker

ANSWER_SECONDS = 3600.0
"""How long the ranks stay: the driver merges meanwhile."""
LOOK_SECONDS = 0.3
REMOTE_LOOK_SECONDS = 3.0
"""The same where a look is a request."""


def await_recovery(worker: Worker, segment: int) -> bool:
    """Whether a recovery was put on record since ``segment`` ended, waiting for it; the same on every rank.

    Raises :class:`cluster.errors.LeaseLost` if the driver is gone and another took over.
    """
    worker.roll_call.note(worker.step, "waiting for a recovery")
    return told_by_rank_zero(f"recovery/{segment}", lambda: _look_for_it(worker))


def _look_for_it(worker: Worker) -> bool:
    pause = REMOTE_LOOK_SECONDS if worker.run.store.reads_ahead else LOOK_SECONDS
    ends_at = time.monotonic() + ANSWER_SECONDS
    while time.monotonic() < ends_at:
        worker.check_lease()
        if len(worker.run.recoveries()) > worker.recovery_number:
            return True
        time.sleep(pause)
    return False
