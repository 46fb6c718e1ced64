"""The lease of a run: one driver at a time trains it or decides how it goes on."""

from __future__ import annotations

import _thread
import logging
from contextlib import AbstractContextManager

from cluster.lease import Lease, hold_lease
from tasks.checkpoints.run_folder import RUN_LEASE, RunFolder

logger = logging.getLogger(__name__)


def hold_run(run: RunFolder) -> AbstractContextManager[Lease]:
    """The lease that lets one driver act on a run; losing it interrupts this process."""

    def interrupt() -> None:
        logger.error("the lease of %s was lost to another driver; stopping", run.url)
        _thread.interrupt_main()

    return hold_lease(run.store, RUN_LEASE, on_lost=interrupt)
