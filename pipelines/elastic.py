"""How many workers a gang gets: as many as asked for, or, where the run allows fewer, as many as there are.

A run with ``training.min_workers`` does not wait for lost nodes: the next gang is as large as fits, and once there is
room for more it is asked to end at a snapshot and a larger one goes on from there. World sizes do not decide what is
computed, but for the order of sums.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from cluster.capacity import answering_slots, count_gpus, has_autoscaler, require_gpus
from cluster.errors import GangFailed, StorageError
from cluster.storage import Store
from configs.errors import UserError
from configs.schema import Config
from pipelines.throttle import Throttle
from tasks.training.requests import write_request
from tasks.training.sharding.mesh import plan_mesh

LOOK_SECONDS = 30.0
"""Between looks for room to grow."""
SETTLE_SECONDS = 60.0
"""How long a gang that cannot be had at all is waited for."""
POLL_SECONDS = 2.0
logger = logging.getLogger(__name__)


def wants_gpus(config: Config) -> bool:
    """Whether gangs of ``config`` take a GPU a rank: if asked for, or by themselves where the cluster has any.

    Any, not enough: a run that lost a node waits for it, or goes on with fewer GPUs, and never falls back to CPUs.
    """
    return config.training.device == "cuda" or (config.training.device == "auto" and count_gpus() > 0)


def choose_size(config: Config, *, with_gpus: bool) -> int:
    """Workers for the next gang on the cluster as it is now.

    Raises :class:`cluster.errors.GangFailed` if there is no room for ``training.min_workers`` after a while.
    """
    wanted, least = config.training.num_workers, config.training.min_workers
    if least is None:
        if with_gpus:
            require_gpus(wanted)
        return wanted
    ends_at = time.monotonic() + SETTLE_SECONDS
    while True:
        slots = answering_slots(config.cluster.train_nodes, with_gpus=with_gpus)
        size = largest_size(config, slots)
        if size is not None:
            if size < wanted:
                logger.warning("the cluster has room for %d ranks: training with %d of %d workers", slots, size, wanted)
            return size
        if has_autoscaler():
            # Ray asks for nodes only once a gang waits for them.
            return wanted
        if time.monotonic() > ends_at:
            raise GangFailed(
                f"the cluster has room for {slots} ranks, training.min_workers={least} asks for more; add nodes and run the same "
                "command again to continue"
            )
        time.sleep(POLL_SECONDS)


def largest_size(config: Config, slots: int) -> int | None:
    """The largest possible gang of at most ``training.num_workers`` and ``slots`` ranks; None below ``min_workers``."""
    least = config.training.min_workers or config.training.num_workers
    for size in range(min(slots, config.training.num_workers), least - 1, -1):
        try:
            plan_mesh(config, size)
        except UserError:
            continue
        return size
    return None


class GrowthWatch:
    """Asks a gang that is smaller than wanted to make way once there is room for a larger one."""

    def __init__(
        self,
        config: Config,
        store: Store,
        request_key: str,
        size: int,
        *,
        slots: Callable[[str | None], int] = answering_slots,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.store = store
        self.request_key = request_key
        self.size = size
        self._slots = slots
        self._throttle = Throttle(LOOK_SECONDS, clock=clock)
        self._has_asked = size >= config.training.num_workers

    def look(self) -> None:
        """Look for room, if it is time; the request is an object that the gang's rank 0 finds at its next snapshot."""
        if self._has_asked or not self._throttle.passes():
            return
        size = largest_size(self.config, self._slots(self.config.cluster.train_nodes))
        if size is None or size <= self.size:
            return
        try:
            write_request(self.store, self.request_key, "resize")
        except StorageError as error:
            logger.warning("there is room for %d workers, but the gang could not be told: %s", size, error)
            return
        logger.warning("there is room for %d workers: the gang of %d ends at its next snapshot", size, self.size)
        self._has_asked = True
