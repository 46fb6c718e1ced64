"""Publish snapshots beside the next steps: every rank uploads its share, rank 0 commits once all have.

One snapshot is in flight at a time. The manifest is written only after every rank reported its objects; if one rank fails,
there never is one, and every rank raises an error that names the rank, the place and the cause. See docs/snapshots.md.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from types import MappingProxyType

from cluster.storage import Store
from tasks.training.snapshots.facts import SnapshotFacts
from tasks.training.snapshots.flight import Flight, Terms
from tasks.training.snapshots.share import HostShare

SLOW_SECONDS = 1.0
"""A wait for storage that is worth a warning."""
NOTHING: Mapping[str, float] = MappingProxyType({})
logger = logging.getLogger(__name__)


class SnapshotWriter:
    """Snapshots of one rank during one segment, below the run at ``run_store``; every rank has one and calls it alike.

    Nothing here is a collective: the training thread is free to use any process group meanwhile.
    """

    def __init__(self, run_store: Store, terms: Terms) -> None:
        self._run_store, self._terms = run_store, terms
        self._taken_at = time.monotonic()
        self._number = 0
        self._flight: Flight | None = None
        self._unread: Mapping[str, float] = NOTHING
        self._has_warned = False

    @property
    def is_busy(self) -> bool:
        """Whether a snapshot is on its way, as far as this rank knows."""
        return self._flight is not None and not self._flight.settled.is_set()

    @property
    def has_failed(self) -> bool:
        """Whether this rank has heard that the snapshot in flight failed: a flag for the gang to reduce. Microseconds."""
        return self._flight is not None and self._flight.has_failed

    def is_ephemeral_due(self, after_seconds: float | None, now: float) -> bool:
        """Whether the last snapshot was begun ``after_seconds`` or longer before ``now`` and none is on its way.

        ``now`` is :func:`time.monotonic`'s. For rank 0 alone to ask, whose answer the gang hears: clocks and threads differ.
        """
        return after_seconds is not None and now - self._taken_at >= after_seconds and not self.is_busy

    def poll(self) -> Mapping[str, float]:
        """Metrics of a snapshot that was committed since the last call, mostly none; microseconds, for every step.

        Says nothing of failures: ranks hear of one up to :data:`tasks.training.snapshots.flight.LAST_LOOK_SECONDS` apart, and a
        rank that raised alone would leave the others in a collective. Reduce :attr:`has_failed` over the gang at every step,
        and where any rank had it set let all of them call :meth:`wait`, which raises.
        """
        if self._flight is not None and self._flight.settled.is_set() and not self._flight.has_failed:
            self.wait()
        unread, self._unread = self._unread, NOTHING
        return unread

    def wait(self) -> float:
        """Wait until nothing is in flight; seconds that it took.

        Every rank returns, or every rank raises: :class:`cluster.errors.StorageError` or one of its kinds,
        :class:`cluster.errors.LeaseLost`, or :class:`tasks.training.snapshots.flight.SnapshotFailed` for all other causes.
        The one exception is a rank that cannot reach the board any more: it raises alone, and its gang has lost it anyway.
        """
        started = time.perf_counter()
        if self._flight is not None:
            self._flight.settled.wait()
            self._unread = self._flight.metrics()
            self._flight = None
        return time.perf_counter() - started

    def begin(self, share: HostShare, facts: SnapshotFacts) -> float:
        """Upload ``share`` beside what follows; seconds waited for the snapshot before, which must be committed first.

        ``share`` is the writer's from now on. Raises as :meth:`wait`, and then begins nothing. So that there is one host copy
        at a time, call :meth:`wait` before gathering, too.
        """
        waited = self.wait()
        self._flight = Flight(self._number, share, facts, self._run_store.child(facts.key), self._terms)
        self._number += 1
        self._taken_at = time.monotonic()
        return waited

    def finish(self) -> Mapping[str, float]:
        """Wait for the snapshot in flight and its commit; metrics that :meth:`poll` did not give yet. Raises as :meth:`wait`.

        Let a barrier of the gang follow before rank 0 ends: its process keeps the board that the others read.
        """
        self.wait()
        return self.poll()

    def warn_if_slow(self, waited_seconds: float) -> None:
        """Say, once a segment, that snapshots follow one another faster than storage takes them."""
        if waited_seconds < SLOW_SECONDS or self._has_warned:
            return
        self._has_warned = True
        logger.warning(
            "training stood still for %.1f s until the snapshot before was committed: %s is slower than snapshots follow one "
            "another. Raise snapshots.interval_tokens or use faster storage (said once; see snapshot/wait_seconds)",
            waited_seconds,
            self._run_store.url,
        )
