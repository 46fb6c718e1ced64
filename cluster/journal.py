"""The metrics journal: what was measured, as new objects under the run URL, before anyone forwards it.

Each object holds JSON lines ``{"step", "tokens", "time", "metrics": {...}}`` of one writer. Nothing is appended to or
rewritten. Storage that is away does not end training: lines wait for it, within a bound. A gang that goes back to a
snapshot journals the replayed steps again under a later segment; readers keep the latest segment's word for each step.
"""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from cluster.errors import ObjectExists, StorageDenied, StorageError, StorageFull
from cluster.storage import Store

FOLDER = "journal"
FIRST_FLUSH_SECONDS = 2.0
LAST_FLUSH_SECONDS = 60.0
KEPT_LINES = 20_000
"""Lines that wait for storage, beside one object under way: some 10 MB, or five hours at a step a second. Older ones are lost."""
FLUSH_PAUSES_SECONDS = (0.5, 1.0, 2.0)
"""Between the attempts of a flush that somebody asked for, during which the gang waits."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Metrics of one step."""

    step: int
    """Completed optimizer steps."""
    tokens: int
    """Tokens seen."""
    time: float
    """Unix seconds when it was measured."""
    metrics: dict[str, float] = field(default_factory=dict)
    """``area/quantity_unit`` to value; non-finite values are kept."""


class JournalWriter:
    """Buffers measurements of one segment and flushes them as objects.

    Flushes are frequent at first, for whoever watches the start, and rarer as the segment ages (a
    twentieth of its age, between 2 s and 60 s), so that weeks of training stay thousands of objects.

    No outage of storage raises: it is logged once, and lines wait for a later flush, :data:`KEPT_LINES` of them at most. Raises
    :class:`cluster.errors.ObjectExists` alone, if another writer journals the same segment.
    """

    def __init__(
        self,
        store: Store,
        segment: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.store = store
        self.segment = segment
        self._clock, self._sleep = clock, sleep
        self._lines: deque[tuple[int, str]] = deque(maxlen=KEPT_LINES)
        self._under_way: tuple[str, bytes] | None = None
        self._has_failed = False
        self._num_lost = 0
        self._flushed_step = -1
        self._flushes_of_step = 0
        self._started_at = self._flushed_at = clock()

    def log(self, step: int, tokens: int, metrics: dict[str, float]) -> None:
        """Add one measurement; flushes when that is due, in a single attempt."""
        self._num_lost += len(self._lines) == KEPT_LINES
        line = json.dumps({"step": step, "tokens": tokens, "time": time.time(), "metrics": metrics})
        self._lines.append((step, line))
        age = self._clock() - self._started_at
        if self._clock() - self._flushed_at > min(LAST_FLUSH_SECONDS, max(FIRST_FLUSH_SECONDS, age / 20)):
            self._flush(())

    def flush(self) -> None:
        """Write what is buffered as one new object, tried again after each of :data:`FLUSH_PAUSES_SECONDS`."""
        self._flush(FLUSH_PAUSES_SECONDS)

    def _flush(self, pauses_seconds: tuple[float, ...]) -> None:
        for pause in (*pauses_seconds, None):
            try:
                self._write()
                break
            except ObjectExists:
                raise
            except StorageError as error:
                if pause is None or isinstance(error, (StorageDenied, StorageFull)):
                    self._warn(error)
                    break
            self._sleep(pause)
        self._flushed_at = self._clock()

    def _write(self) -> None:
        """Write the object that is under way, then one of the lines that came after it."""
        while self._under_way or self._lines:
            if self._under_way is None:
                self._under_way = self._take_lines()
            key, data = self._under_way
            try:
                self.store.create(key, data)
            except ObjectExists:
                # An earlier attempt may have been carried out and its answer lost.
                if self.store.read(key) != data:
                    raise
            self._under_way = None
        if self._has_failed:
            logger.info("the journal of %s is written again; %d lines were lost", self.store.url, self._num_lost)
        self._has_failed, self._num_lost = False, 0

    def _take_lines(self) -> tuple[str, bytes]:
        """Key and bytes of the next object; they stay the same however often it is tried."""
        first_step = self._lines[0][0]
        self._flushes_of_step = self._flushes_of_step + 1 if first_step == self._flushed_step else 0
        self._flushed_step = first_step
        data = "".join(f"{line}\n" for _, line in self._lines).encode()
        self._lines.clear()
        return journal_key(self.segment, first_step, self._flushes_of_step), data

    def _warn(self, error: StorageError) -> None:
        if not self._has_failed:
            logger.warning("the journal of %s waits for storage, up to %d lines: %s", self.store.url, KEPT_LINES, error)
        self._has_failed = True


def journal_key(segment: int, first_step: int, again: int = 0) -> str:
    """Key of the journal object of ``segment`` that starts with ``first_step``; ``again`` counts those that start alike."""
    return f"{FOLDER}/{segment:04d}-{first_step:09d}{f'-{again}' if again else ''}.jsonl"


def journal_keys(store: Store) -> list[str]:
    """Journal objects, in the order of segment and step."""
    return [key for key in store.keys(FOLDER) if key.endswith(".jsonl")]


def read_journal_object(store: Store, key: str) -> list[Measurement]:
    """Measurements of one journal object."""
    return [Measurement(**json.loads(line)) for line in store.read(key).splitlines()]


def read_journal(store: Store) -> list[Measurement]:
    """All measurements by step; a step that was replayed appears once, as the latest segment measured it."""
    return latest(read_journals(store))


def latest(journals: Mapping[int, Sequence[Measurement]]) -> list[Measurement]:
    """Of measurements by segment, the latest segment's word for each step, by step."""
    by_step = {row.step: row for _, rows in sorted(journals.items()) for row in rows}
    return [by_step[step] for step in sorted(by_step)]


def read_journals(store: Store) -> dict[int, list[Measurement]]:
    """All measurements by segment and step, what later segments measured anew included."""
    by_segment: dict[int, dict[int, Measurement]] = {}
    for key in journal_keys(store):
        rows = by_segment.setdefault(int(key.rpartition("/")[2].partition("-")[0]), {})
        for new in read_journal_object(store, key):
            old = rows.get(new.step)
            # A segment may say several things of a step: of its last, what its snapshot cost.
            rows[new.step] = replace(new, metrics={**old.metrics, **new.metrics}) if old else new
    return {segment: [rows[step] for step in sorted(rows)] for segment, rows in by_segment.items()}


def write_event(store: Store, kind: str, details: dict[str, object]) -> None:
    """Record that something happened to the run, as a new object."""
    record = {"kind": kind, "time": time.time(), **details}
    stamp = time.time_ns()
    while True:
        try:
            store.create(f"events/{stamp:020d}-{kind}.json", json.dumps(record, sort_keys=True).encode())
            return
        except ObjectExists:
            stamp += 1


def read_events(store: Store) -> list[dict[str, object]]:
    """Events of the run, oldest first."""
    return [json.loads(store.read(key)) for key in store.keys("events")]
