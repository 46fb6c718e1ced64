"""The metrics journal and the events: new objects only, the latest word for each step."""

from __future__ import annotations

import math
import uuid
from pathlib import Path

import pytest

from cluster.errors import ObjectExists, StorageError
from cluster.journal import (
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


def test_journal_failed_flush_keeps_the_measurements(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = JournalWriter(store, 1)
    writer.log(1, 1, {"train/loss": 1.0})

    def away(key: str, data: bytes) -> None:
        raise StorageError("storage is away")

    with monkeypatch.context() as patch:
        patch.setattr(store, "create", away)
        with pytest.raises(StorageError):
            writer.flush()
    writer.flush()
    assert losses(read_journal(store)) == {1: 1.0}


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
