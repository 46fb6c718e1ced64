"""One snapshot on its way from host memory to a committed manifest, as one rank sees it: two threads beside training.

One thread works: it uploads this rank's share and reports it; on rank 0 it then waits for all reports and commits. The
other listens on the board for the outcome, so that a rank hears of another's failure even while its own upload stands still.
"""

from __future__ import annotations

import functools
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cluster.errors import LeaseExpired, LeaseLost, StorageDenied, StorageError, StorageFull
from cluster.storage import Store
from tasks.checkpoints.manifest import Shard
from tasks.training.snapshots.board import Outcome, RankReport, SnapshotBoard
from tasks.training.snapshots.facts import SnapshotFacts, commit_snapshot
from tasks.training.snapshots.patient_store import PatientStore
from tasks.training.snapshots.share import HostShare, ShareObject, share_objects, write_object
from tasks.training.snapshots.upload import PAUSES_SECONDS, Abandoned, Retries

PATIENCE_SECONDS = 1800.0
"""How long a rank that is done waits for the slowest; a gang that lost a rank is ended sooner, by who started it."""
GRACE_SECONDS = 60.0
"""By which the others' patience is longer than rank 0's, which can say who is missing."""
FIRST_LOOK_SECONDS, LAST_LOOK_SECONDS = 0.01, 0.5
"""Between looks at the board: rarer the longer it takes."""
LEASE_LOOK_SECONDS = 1.0
"""Between looks at a lease that expired unrenewed."""
LINGER_SECONDS = 5.0
"""How long rank 0, whose process keeps the board, stays for the others to read the outcome."""
logger = logging.getLogger(__name__)


class SnapshotFailed(Exception):
    """A snapshot was not committed; the message names rank, place and cause. What was committed before is intact."""


ERRORS: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (LeaseExpired, LeaseLost, StorageError, StorageDenied, StorageFull)
}
"""Causes that every rank raises as what they are, so that a driver can tell them; all others are :class:`SnapshotFailed`."""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What all flights of one segment have in common on this rank."""

    board: SnapshotBoard
    """Where ranks report."""
    check_lease: Callable[[], None]
    """Raises :class:`cluster.errors.LeaseLost` if another driver took the run over, and its subclass
    :class:`cluster.errors.LeaseExpired` if the driver has not renewed in time and may yet: then it is asked again."""
    pauses_seconds: tuple[float, ...] = PAUSES_SECONDS
    """Between attempts to write an object."""
    patience_seconds: float = PATIENCE_SECONDS
    """How long rank 0 waits for the others once its own share is written; the others wait a little longer for its word."""


class Flight:
    """Snapshot ``number`` of the segment, whose folder is ``store``. Begins at once; ends with :attr:`settled`."""

    def __init__(self, number: int, share: HostShare, facts: SnapshotFacts, store: Store, terms: Terms) -> None:
        self.facts = facts
        self.settled = threading.Event()
        """Set once the outcome is known on this rank."""
        self._number, self._store, self._terms, self._board = number, store, terms, terms.board
        self._share: HostShare | None = share
        self._begun = time.perf_counter()
        self._has_uploaded = threading.Event()
        self._uploaded_at = math.inf
        self._has_left_board = threading.Event()
        self._retries = Retries(pauses_seconds=terms.pauses_seconds)
        self._outcome: Outcome | None = None
        self._cause: BaseException | None = None
        # Daemons: a process that is told to end does not wait for storage; without a manifest nothing was published.
        for body in (self._work, self._listen):
            threading.Thread(target=body, daemon=True, name=f"snapshot-{facts.step}{body.__name__}").start()

    def metrics(self) -> dict[str, float]:
        """What the commit took. Call once settled; raises the failure if there was one, on every rank the same."""
        if self._outcome is None:
            message = f"rank {self._board.rank} heard no outcome of the snapshot at {self._store.url}: {self._cause}"
            raise SnapshotFailed(message) from self._cause
        if not self._outcome.is_committed:
            raise ERRORS.get(self._outcome.error, SnapshotFailed)(self._outcome.message) from self._cause
        return self._outcome.metrics

    @property
    def has_failed(self) -> bool:
        """Whether a failure is known here."""
        return self.settled.is_set() and (self._outcome is None or not self._outcome.is_committed)

    def _work(self) -> None:
        try:
            self._report_or_fail()
        except Exception as error:  # noqa: BLE001  the board is gone, so nobody can be told; raised by the training thread
            self._cause = self._cause or error
            self._has_left_board.set()
        finally:
            self._share = None

    def _report_or_fail(self) -> None:
        try:
            self._board.report(self._number, self._upload())
            if self._board.rank == 0:
                self._board.settle(self._number, self._commit())
        except Abandoned:
            pass
        except Exception as error:  # noqa: BLE001  told to every rank, and raised there by the training thread
            self._cause = error
            self._board.settle(self._number, self._failure(error))

    def _upload(self) -> RankReport:
        assert self._share is not None
        shards = [self._write(item) for item in share_objects(self._share)]
        # A second copy of the rank's state in memory: given up before waiting for others.
        self._share = None
        self._uploaded_at = time.monotonic()
        self._has_uploaded.set()
        seconds = time.perf_counter() - self._begun
        return RankReport(shards=tuple(shards), upload_seconds=seconds, bytes=sum(shard.bytes for shard in shards))

    def _write(self, item: ShareObject) -> Shard:
        work = functools.partial(write_object, item, self._store, self._retries.check)
        return self._retries.run(work, f"{self._store.url}/{item.key}")

    def _commit(self) -> Outcome:
        reports = self._await_reports()
        started = time.perf_counter()
        shards = tuple(shard for report in reports for shard in report.shards)
        store = PatientStore(self._store, self._retries)
        commit_snapshot(store, self.facts, shards, self._check_lease)
        ended = time.perf_counter()
        metrics = {
            "snapshot/upload_seconds": max(report.upload_seconds for report in reports),
            "snapshot/commit_seconds": ended - started,
            "snapshot/publish_seconds": ended - self._begun,
            "snapshot/bytes": float(sum(report.bytes for report in reports)),
        }
        return Outcome(is_committed=True, metrics=metrics)

    def _check_lease(self) -> None:
        """Return once the lease is in force, and raise if it is lost, or stays expired until the others' patience ends."""
        is_told = False
        while True:
            self._retries.check()
            try:
                return self._retries.run(self._terms.check_lease, f"the lease of {self._store.url}")
            except LeaseExpired as expired:
                # An outage kept the driver from renewing: it tries on, and succeeds unless another took over.
                if time.monotonic() > self._uploaded_at + self._terms.patience_seconds:
                    raise
                if not is_told:
                    logger.warning("%s waits for its lease to be renewed: %s", self._store.url, expired)
                is_told = True
                if self._retries.abandon.wait(LEASE_LOOK_SECONDS):
                    raise Abandoned("lease") from expired

    def _failure(self, error: Exception) -> Outcome:
        kinds = [kind.__name__ for kind in type(error).__mro__ if kind.__name__ in ERRORS]
        return Outcome(
            is_committed=False,
            error=kinds[0] if kinds else type(error).__name__,
            message=f"the snapshot of step {self.facts.step} at {self._store.url} was not committed: "
            f"rank {self._board.rank} failed: {type(error).__name__}: {error}",
        )

    def _await_reports(self) -> list[RankReport]:
        ends_at = time.monotonic() + self._terms.patience_seconds
        for pause in _looks():
            reports = self._board.reports(self._number)
            if reports is not None:
                return reports
            self._retries.check()
            if time.monotonic() > ends_at:
                missing = self._board.missing(self._number)
                raise TimeoutError(f"no word from ranks {missing} for {self._terms.patience_seconds:.0f} s")
            time.sleep(pause)
        raise AssertionError("looks do not end")

    def _listen(self) -> None:
        try:
            self._outcome = self._await_outcome()
            self._retries.abandon.set()
            self._board.acknowledge(self._number)
            if self._board.rank == 0:
                self._linger()
        except Exception as error:  # noqa: BLE001  raised by the training thread
            self._cause = self._cause or error
        finally:
            self._retries.abandon.set()
            self.settled.set()

    def _await_outcome(self) -> Outcome:
        patience = self._terms.patience_seconds + GRACE_SECONDS
        ends_at = math.inf
        for pause in _looks():
            outcome = self._board.outcome(self._number)
            if outcome is not None:
                return outcome
            if self._has_left_board.is_set():
                raise ConnectionError(f"the gang's store does not answer: {self._cause}")
            if self._has_uploaded.is_set():
                ends_at = min(ends_at, time.monotonic() + patience)
            if time.monotonic() > ends_at:
                raise TimeoutError(f"no word from rank 0 for {patience:.0f} s")
            time.sleep(pause)
        raise AssertionError("looks do not end")

    def _linger(self) -> None:
        ends_at = time.monotonic() + LINGER_SECONDS
        while not self._board.is_read_by_all(self._number):
            if time.monotonic() > ends_at:
                # A rank that is slow to look has still to find it: the outcome stays on the board.
                return
            time.sleep(FIRST_LOOK_SECONDS)
        self._board.clear(self._number)


def _looks() -> Iterator[float]:
    """Seconds to pause after each look at the board."""
    pause = FIRST_LOOK_SECONDS
    while True:
        yield pause
        pause = min(pause * 1.5, LAST_LOOK_SECONDS)
