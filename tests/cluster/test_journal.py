"""The metrics journal and the events: new objects only, the latest word for each step."""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster import journal
from cluster.errors import ObjectExists, StorageDenied, StorageError, StorageFull
from cluster.journal import (
    FLUSH_PAUSES_SECONDS,
    LAST_FLUSH_SECONDS,
    JournalWriter,
    Measurement,
    journal_key,
    journal_keys,
    read_events,
    read_journal,
    read_journal_object,
    write_event,
)
from cluster.storage import Store, open_store
from tests.faulty_store import FaultyStore


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return open_store(str(tmp_path) if request.param == "local" else f"memory://{uuid.uuid4().hex}")


def log_steps(store: Store, segment: int, steps: range, loss: float) -> None:
    writer = JournalWriter(store, segment)
    for step in steps:
        writer.log(step, step * 100, {"train/loss": loss})
    writer.flush()


def losses(measurements: list[Measurement]) -> dict[int, float]:
    return {measurement.step: measurement.metrics["train/loss"] for measurement in measurements}


def test_journal_round_trip_keeps_every_field(store: Store) -> None:
    writer = JournalWriter(store, 1)
    writer.log(1, 2048, {"train/loss": 5.5, "train/gradient_norm": 0.25})
    writer.flush()
    (measurement,) = read_journal(store)
    assert (measurement.step, measurement.tokens) == (1, 2048)
    assert measurement.metrics == {"train/loss": 5.5, "train/gradient_norm": 0.25}
    assert measurement.time > 0


def test_journal_nonfinite_values_are_kept(store: Store) -> None:
    writer = JournalWriter(store, 1)
    writer.log(1, 1, {"nan": math.nan, "inf": math.inf, "minus": -math.inf})
    writer.flush()
    metrics = read_journal(store)[0].metrics
    assert math.isnan(metrics["nan"])
    assert (metrics["inf"], metrics["minus"]) == (math.inf, -math.inf)


def test_journal_says_more_of_a_step_that_was_flushed(store: Store) -> None:
    writer = JournalWriter(store, 1)
    for number in range(4):
        writer.log(7, 70, {f"snapshot/{number}": float(number)})
        writer.flush()
    later = JournalWriter(store, 2)
    later.log(7, 70, {"train/loss": 1.0})
    later.log(8, 80, {"train/loss": 2.0})
    later.flush()
    assert len(journal_keys(store)) == 5
    # All that one segment said of a step; the latest segment's word stands for those before.
    assert [(row.step, row.metrics) for row in read_journal(store)] == [
        (7, {"train/loss": 1.0}),
        (8, {"train/loss": 2.0}),
    ]
    for key in journal_keys(store)[4:]:
        store.delete(key)
    assert [row.metrics for row in read_journal(store)] == [{f"snapshot/{n}": float(n) for n in range(4)}]


def test_journal_flush_writes_a_new_object_each_time(store: Store) -> None:
    writer = JournalWriter(store, 2)
    for step in (7, 8):
        writer.log(step, step, {"train/loss": float(step)})
        writer.flush()
    assert journal_keys(store) == [journal_key(2, 7), journal_key(2, 8)]
    assert losses(read_journal_object(store, journal_key(2, 8))) == {8: 8.0}


def test_journal_flush_without_measurements_writes_nothing(store: Store) -> None:
    JournalWriter(store, 1).flush()
    assert store.keys() == []
    assert read_journal(store) == []


def test_journal_replayed_steps_latest_segment_wins(store: Store) -> None:
    log_steps(store, 1, range(1, 11), loss=1.0)
    log_steps(store, 2, range(6, 13), loss=2.0)
    assert losses(read_journal(store)) == {**dict.fromkeys(range(1, 6), 1.0), **dict.fromkeys(range(6, 13), 2.0)}


def test_journal_segments_beyond_nine_stay_in_order(store: Store) -> None:
    for segment in (2, 10, 9):
        log_steps(store, segment, range(1, 2), loss=float(segment))
    assert losses(read_journal(store)) == {1: 10.0}


def test_journal_object_names_sort_by_segment_and_step(store: Store) -> None:
    for segment, step in ((2, 1), (1, 100_000), (1, 20_000), (1, 3)):
        log_steps(store, segment, range(step, step + 1), loss=0.0)
    assert journal_keys(store) == [
        journal_key(segment, step) for segment, step in ((1, 3), (1, 20_000), (1, 100_000), (2, 1))
    ]


def test_journal_written_object_is_never_rewritten(store: Store) -> None:
    log_steps(store, 1, range(1, 4), loss=1.0)
    with pytest.raises(ObjectExists):
        log_steps(store, 1, range(1, 3), loss=2.0)
    assert losses(read_journal(store)) == dict.fromkeys(range(1, 4), 1.0)


class Away:
    """A ``fail`` for a store that is away while a test says so, and counts the attempts."""

    def __init__(self) -> None:
        self.is_away = True
        self.attempts = 0

    def __call__(self, method: str, _key: str) -> bool:
        self.attempts += method == "create"
        return self.is_away


class Clock:
    """Seconds that pass when something sleeps or a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def writer_with(store: Store, fail: Callable[[str, str], bool]) -> tuple[JournalWriter, Clock]:
    clock = Clock()
    return JournalWriter(FaultyStore(store, fail), 1, clock=clock, sleep=clock.sleep), clock


def test_journal_timed_flush_in_an_outage_waits_and_says_so_once(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    away = Away()
    writer, clock = writer_with(store, away)
    for step in range(1, 101):
        clock.now += 3.0
        writer.log(step, step, {"train/loss": float(step)})
    away.is_away = False
    clock.now += LAST_FLUSH_SECONDS
    writer.log(101, 101, {"train/loss": 101.0})
    # Due after 2 s until the segment is 60 s old: one attempt each, and none that makes the gang wait.
    assert away.attempts > 20
    assert clock.now == 300.0 + LAST_FLUSH_SECONDS
    assert losses(read_journal(store)) == {step: float(step) for step in range(1, 102)}
    assert [record.levelname for record in caplog.records].count("WARNING") == 1
    # Another outage is another line.
    away.is_away = True
    writer.log(102, 102, {})
    writer.flush()
    assert [record.levelname for record in caplog.records].count("WARNING") == 2


def test_journal_flush_before_a_snapshot_tries_again_then_keeps_the_lines(store: Store) -> None:
    away = Away()
    writer, clock = writer_with(store, away)
    writer.log(1, 1, {"train/loss": 1.0})
    writer.flush()
    assert (away.attempts, clock.now) == (1 + len(FLUSH_PAUSES_SECONDS), sum(FLUSH_PAUSES_SECONDS))
    assert read_journal(store) == []
    writer.log(2, 2, {"train/loss": 2.0})
    away.is_away = False
    writer.flush()
    assert losses(read_journal(store)) == {1: 1.0, 2: 2.0}
    assert journal_keys(store) == [journal_key(1, 1), journal_key(1, 2)]


def test_journal_flush_before_a_snapshot_outlives_a_short_outage(store: Store) -> None:
    failures = iter([True, True, True])
    writer, _ = writer_with(store, lambda method, _: method == "create" and next(failures, False))
    writer.log(1, 1, {"train/loss": 1.0})
    writer.flush()
    assert losses(read_journal(store)) == {1: 1.0}


@pytest.mark.parametrize("kind", [StorageDenied, StorageFull])
def test_journal_refused_for_good_does_not_make_the_gang_wait(store: Store, kind: type[StorageError]) -> None:
    def refuse(_method: str, _key: str) -> bool:
        raise kind("no")

    writer, clock = writer_with(store, refuse)
    writer.log(1, 1, {})
    writer.flush()
    assert clock.now == 0.0


def test_journal_written_though_the_answer_was_lost_is_not_written_twice(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = store.create
    clock = Clock()
    writer = JournalWriter(store, 1, clock=clock, sleep=clock.sleep)
    writer.log(1, 1, {"train/loss": 1.0})

    def carried_out(key: str, data: bytes) -> None:
        create(key, data)
        raise StorageError("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(store, "create", carried_out)
        clock.now += 3.0
        writer.log(2, 2, {"train/loss": 2.0})
    writer.log(3, 3, {"train/loss": 3.0})
    writer.flush()
    assert losses(read_journal(store)) == {1: 1.0, 2: 2.0, 3: 3.0}
    assert journal_keys(store) == [journal_key(1, 1), journal_key(1, 3)]


def test_journal_outage_beyond_the_bound_loses_the_oldest_lines(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(journal, "KEPT_LINES", 5)
    away = Away()
    writer, _ = writer_with(store, away)
    writer.log(1, 1, {"train/loss": 1.0})
    writer.flush()
    for step in range(2, 10):
        writer.log(step, step, {"train/loss": float(step)})
    away.is_away = False
    with caplog.at_level("INFO"):
        writer.flush()
    # Step 1 was under way as an object of its own.
    assert losses(read_journal(store)) == {1: 1.0, **{step: float(step) for step in range(5, 10)}}
    assert "3 lines were lost" in caplog.text


def test_journal_other_objects_in_the_folder_are_ignored(store: Store) -> None:
    log_steps(store, 1, range(1, 2), loss=1.0)
    store.put("journal/notes.txt", b"not a journal")
    assert losses(read_journal(store)) == {1: 1.0}


def test_events_read_oldest_first_with_their_details(store: Store) -> None:
    for kind in ("spike", "merge", "recovery"):
        write_event(store, kind, {"step": len(kind)})
    events = read_events(store)
    assert [(event["kind"], event["step"]) for event in events] == [("spike", 5), ("merge", 5), ("recovery", 8)]
    assert len(store.keys("events")) == 3


def test_events_of_the_same_nanosecond_are_both_kept(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time_ns", lambda: 1_700_000_000_000_000_000)
    write_event(store, "merge", {"name": "first"})
    write_event(store, "merge", {"name": "second"})
    assert [event["name"] for event in read_events(store)] == ["first", "second"]
