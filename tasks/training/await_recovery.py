"""A gang whose segment ended with a spike stays together until the driver has decided how to go on."""

from __future__ import annotations

import time

from torch.distributed import distributed_c10d as c10d

from tasks.training.worker import Worker

ANSWER_SECONDS = 3600.0
"""How long the ranks stay: the driver merges meanwhile."""
LOOK_SECONDS = 0.3
REMOTE_LOOK_SECONDS = 3.0
"""The same where a look is a request."""


def await_recovery(worker: Worker, segment: int) -> bool:
    """Whether a recovery was put on record since ``segment`` ended, waiting for it; the same on every rank.

    Ranks wait for rank 0 at the key-value store, not in a collective: merging may take longer than a collective may.
    Raises :class:`cluster.errors.LeaseLost` if the driver is gone and another took over.
    """
    store = c10d.PrefixStore("recovery", c10d._get_default_store())
    key = f"after-segment-{segment}"
    if worker.rank == 0:
        store.set(key, str(_look_for_it(worker)))
    ends_at = time.monotonic() + 2 * ANSWER_SECONDS
    while not store.check([key]) and time.monotonic() < ends_at:
        worker.roll_call.note(worker.step, "waiting for a recovery")
        time.sleep(LOOK_SECONDS)
    return bool(store.get(key) == b"True")


def _look_for_it(worker: Worker) -> bool:
    pause = REMOTE_LOOK_SECONDS if worker.run.store.reads_ahead else LOOK_SECONDS
    ends_at = time.monotonic() + ANSWER_SECONDS
    while time.monotonic() < ends_at:
        worker.check_lease()
        if len(worker.run.recoveries()) > worker.recovery_number:
            return True
        time.sleep(pause)
    return False
