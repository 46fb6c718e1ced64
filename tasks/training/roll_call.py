"""Who keeps the gang waiting: every rank says now and then how far it is, so that a time-out can name the one that hangs.

The process group's own error says that somebody did not come. What ranks say goes through the key-value store by which
they met, from a thread of each, so a rank that is stuck in Python, in storage or in the kernel is told from one that is
stopped or gone.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from dataclasses import dataclass

from torch.distributed import distributed_c10d as c10d

BEAT_SECONDS = 1.0
LISTEN_SECONDS = 3.0
"""Between two readings: whoever lives has said something new."""
TIMEOUT_MARKS = ("timed out", "timeout", "time out")
logger = logging.getLogger(__name__)


class RankHung(Exception):
    """A rank did not come to a collective in time; the message names it and what it was last known to do."""


@dataclass(frozen=True, kw_only=True)
class Sign:
    """What a rank said of itself."""

    rank: int
    """Who."""
    host: str
    """Where."""
    step: int
    """Completed steps."""
    stage: str
    """What it was doing."""
    beat: int
    """Counts up while the process lives."""


class RollCall:
    """One rank's part: tell where it is, and find out who is missing."""

    def __init__(self, store: c10d.Store, rank: int, world_size: int) -> None:
        self.rank, self._store, self._world_size = rank, store, world_size
        self._host = socket.gethostname()
        self.place = (0, "starting")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._tell, daemon=True, name="roll call")
        self._thread.start()

    def note(self, step: int, stage: str) -> None:
        """Remember where this rank is; costs an assignment."""
        self.place = (step, stage)

    def end(self) -> None:
        """Say nothing more."""
        self._stop.set()
        self._thread.join()

    def explain(self, error: BaseException) -> RankHung | None:
        """Who is behind or silent, if ``error`` is a time-out of a collective; takes :data:`LISTEN_SECONDS`."""
        text = str(error).lower()
        if not isinstance(error, RuntimeError) or not any(mark in text for mark in TIMEOUT_MARKS):
            return None
        before = {sign.rank: sign for sign in self.signs()}
        time.sleep(LISTEN_SECONDS)
        now = {sign.rank: sign for sign in self.signs()}
        front = max((sign.step for sign in now.values()), default=0)
        guilty = [
            _describe(
                rank, now.get(rank), is_silent=rank not in now or now[rank].beat == before.get(rank, now[rank]).beat
            )
            for rank in range(self._world_size)
            if rank not in now or now[rank].step < front or (rank in before and now[rank].beat == before[rank].beat)
        ]
        # All as far as each other: one stands in the same step at something else than waiting for the rest.
        guilty = guilty or [
            _describe(sign.rank, sign, is_silent=False) for sign in now.values() if sign.stage != self.place[1]
        ]
        who = "; ".join(guilty) or f"no rank stands out, all are at step {front} ({self.place[1]})"
        return RankHung(f"a rank did not come to a collective in time: {who}")

    def signs(self) -> list[Sign]:
        """What each rank that ever said something said last."""
        keys = [key for key in (_key(rank) for rank in range(self._world_size)) if self._store.check([key])]
        return [Sign(**json.loads(self._store.get(key))) for key in keys]

    def _tell(self) -> None:
        beat = 0
        while True:
            step, stage = self.place
            values = {"rank": self.rank, "host": self._host, "step": step, "stage": stage, "beat": beat}
            try:
                self._store.set(_key(self.rank), json.dumps(values))
            except RuntimeError as gone:
                # The store lives with rank 0; when that is gone, so is the gang.
                logger.info("the gang's key-value store is gone: %s", gone)
                return
            if self._stop.wait(BEAT_SECONDS):
                return
            beat += 1


def open_roll_call(rank: int, world_size: int) -> RollCall:
    """A roll call of the default process group."""
    store = c10d.PrefixStore("roll-call", c10d._get_default_store())
    return RollCall(store, rank, world_size)


def _key(rank: int) -> str:
    return f"rank/{rank}"


def _describe(rank: int, sign: Sign | None, *, is_silent: bool) -> str:
    if sign is None:
        return f"rank {rank} never said anything"
    state = "its process says nothing any more" if is_silent else "its process lives"
    return f"rank {rank} on {sign.host} stands at step {sign.step} ({sign.stage}), {state}"
