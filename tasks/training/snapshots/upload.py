"""Write one object of a snapshot from a background thread: again after a pause when storage failed, not for ever."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from cluster.errors import ObjectExists, ObjectMissing, StorageDenied, StorageError, StorageFull

PAUSES_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0)
"""Between attempts, give or take half: two minutes of outage, on top of the retries of single requests in the store."""
HOPELESS = (StorageDenied, StorageFull, ObjectMissing, ObjectExists)
"""What another attempt does not mend, or what is an answer rather than a failure."""
Result = TypeVar("Result")
logger = logging.getLogger(__name__)


class Abandoned(Exception):
    """The snapshot failed elsewhere; what is left of this upload is pointless."""


@dataclass(frozen=True, kw_only=True)
class Retries:
    """How often and how long one rank tries; safe to use from its upload thread while another thread abandons it."""

    pauses_seconds: Sequence[float] = PAUSES_SECONDS
    """Before the second attempt, the third, and so on; the number of attempts is one more."""
    abandon: threading.Event = field(default_factory=threading.Event)
    """Once set, attempts and pauses end with :class:`Abandoned`."""
    draws: random.Random = field(default_factory=random.Random)
    """Spreads the pauses, so that ranks that were throttled together do not come back together."""

    def run(self, work: Callable[[], Result], what: str) -> Result:
        """The result of ``work``, which must be safe to run again; ``what`` names it in the log.

        Raises the last :class:`cluster.errors.StorageError`, at once if it is :data:`HOPELESS`, and whatever else ``work``
        raises as it comes.
        """
        for attempt, pause in enumerate(self.pauses_seconds, start=1):
            try:
                return work()
            except HOPELESS:
                raise
            except StorageError as error:
                seconds = pause * (0.5 + self.draws.random())
                logger.warning("%s: attempt %d failed (%s); trying again in %.1f s", what, attempt, error, seconds)
                if self.abandon.wait(seconds):
                    raise Abandoned(what) from error
        return work()

    def check(self) -> None:
        """Raise :class:`Abandoned` if the upload is pointless; asked between pieces."""
        if self.abandon.is_set():
            raise Abandoned("upload")
