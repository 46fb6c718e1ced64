"""The metrics journal: what was measured, as new objects under the run URL, before anyone forwards it.

Each object holds JSON lines ``{"step", "tokens", "time", "metrics": {...}}`` of one writer. Nothing
is appended to or rewritten. A gang that goes back to a snapshot journals the replayed steps again
under a later segment; readers keep the latest segment's word for each step.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field, replace

from cluster.errors import ObjectExists
from cluster.storage import Store

FOLDER = "journal"
FIRST_FLUSH_SECONDS = 2.0
LAST_FLUSH_SECONDS = 60.0


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
    """

    def __init__(self, store: Store, segment: int) -> None:
        self.store = store
        self.segment = segment
        self._lines: list[str] = []
        self._first_step = 0
        self._flushed_step = -1
        self._flushes_of_step = 0
        self._started_at = self._flushed_at = time.monotonic()

    def log(self, step: int, tokens: int, metrics: dict[str, float]) -> None:
        """Add one measurement; flushes when that is due."""
        if not self._lines:
            self._first_step = step
        self._lines.append(json.dumps({"step": step, "tokens": tokens, "time": time.time(), "metrics": metrics}))
        age = time.monotonic() - self._started_at
        if time.monotonic() - self._flushed_at > min(LAST_FLUSH_SECONDS, max(FIRST_FLUSH_SECONDS, age / 20)):
            self.flush()

    def flush(self) -> None:
        """Write what is buffered as one new object."""
        if self._lines:
            again = 0
            if self._first_step == self._flushed_step:
                self._flushes_of_step += 1
                again = self._flushes_of_step
            else:
                self._flushes_of_step = 0
            key = journal_key(self.segment, self._first_step, again)
            self.store.create(key, ("\n".join(self._lines) + "\n").encode())
            self._flushed_step = self._first_step
        self._lines = []
        self._flushed_at = time.monotonic()


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
    by_step: dict[int, tuple[str, Measurement]] = {}
    for key in journal_keys(store):
        segment = key.rpartition("/")[2].partition("-")[0]
        for new in read_journal_object(store, key):
            written_by, old = by_step.get(new.step, ("", new))
            # One segment may say several things of a step: of its last, what its snapshot cost.
            metrics = {**old.metrics, **new.metrics} if written_by == segment else new.metrics
            by_step[new.step] = segment, replace(new, metrics=metrics)
    return [by_step[step][1] for step in sorted(by_step)]


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
