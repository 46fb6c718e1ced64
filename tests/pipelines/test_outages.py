"""Storage that is away for a while: work beside training goes on after it, and clean-up does not hide how things ended."""

from __future__ import annotations

import concurrent.futures
import logging
import threading
import uuid
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.errors import LeaseExpired, LeaseLost, StorageError
from cluster.storage import Store, open_store
from pipelines import beside, gangs
from pipelines.beside import Beside
from pipelines.timing import stage_seconds, timed
from tasks.checkpoints.run_folder import RunFolder
from tests.faulty_store import FaultyStore
from tests.retention_run import small_config

PATIENCE_SECONDS = 30


@pytest.fixture
def store() -> Store:
    return open_store(f"memory://{uuid.uuid4().hex}/run")


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "POLL_SECONDS", 0.001)
    monkeypatch.setattr(beside, "PAUSES_SECONDS", (0.001, 0.001))


class Work:
    """Stands in for merging or evaluating: each call takes the next of ``outcomes``, then there is nothing to do."""

    def __init__(self, *outcomes: Exception | int) -> None:
        self.outcomes: Iterator[Exception | int] = iter(outcomes)
        self.is_done = threading.Event()
        self.calls = 0

    def __call__(self) -> int:
        self.calls += 1
        outcome = next(self.outcomes, None)
        if isinstance(outcome, Exception):
            raise outcome
        if outcome is None:
            self.is_done.set()
        return outcome or 0


def beside_with(merge: Work, monkeypatch: pytest.MonkeyPatch) -> Beside:
    monkeypatch.setattr(Beside, "_merge_due", lambda _: merge())
    monkeypatch.setattr(Beside, "_evaluate_pending", lambda _: 0)
    return Beside(RunFolder(f"memory://{uuid.uuid4().hex}/run"), small_config(steps=5))


@pytest.mark.parametrize(
    "outage",
    [StorageError("away"), LeaseExpired("late"), LeaseLost("pins expired"), concurrent.futures.CancelledError()],
    ids=lambda error: type(error).__name__,
)
def test_outage_beside_training_costs_a_pause_however_often(outage: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work(*[outage] * 20, 1, outage, 1)
    with beside_with(work, monkeypatch) as made:
        assert work.is_done.wait(PATIENCE_SECONDS)
        made.finish()
    assert work.calls >= 24


def test_outage_that_outlasts_training_is_raised_by_finish(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work(*[StorageError(f"away {n}") for n in range(100_000)])
    with beside_with(work, monkeypatch) as made, pytest.raises(StorageError, match="away"):
        made.finish()


def test_outage_after_training_that_ends_in_time_is_outlived(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work(StorageError("away"), StorageError("away"), 1)
    made = beside_with(work, monkeypatch)
    made._training_done.set()
    with made:
        made.finish()
    assert work.is_done.is_set()


def test_outage_is_left_at_once_when_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "PAUSES_SECONDS", (1e6,))
    work = Work(StorageError("away"))
    with beside_with(work, monkeypatch) as made:
        pass
    assert not any(thread.is_alive() for thread in made._threads)


def test_mistake_beside_training_still_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work(ValueError("a mistake"), 1)
    with beside_with(work, monkeypatch) as made, pytest.raises(ValueError, match="a mistake"):
        made.finish()
    assert work.calls == 1


def test_timed_storage_away_hides_neither_success_nor_error(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    away = FaultyStore(store, lambda *_: True)
    with timed(away, "training a", "training"):
        pass
    with pytest.raises(RuntimeError, match="the real end"), timed(away, "training b", "training"):
        raise RuntimeError("the real end")
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert "training b" in caplog.text
    with timed(store, "training c", "training"):
        pass
    assert list(stage_seconds(store)) == [("training c", "training")]


def test_gang_storage_away_hides_neither_its_end_nor_the_interrupt(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Away(FaultyStore):
        def delete(self, key: str) -> None:
            raise StorageError(f"{key}: away")

    def run_gang(*_: Any, on_interrupt: Any, **__: Any) -> dict[str, Any]:
        on_interrupt()
        raise KeyboardInterrupt

    monkeypatch.setattr(gangs, "wants_gpus", lambda _: False)
    monkeypatch.setattr(gangs, "choose_size", lambda *_, **__: 1)
    monkeypatch.setattr(gangs, "open_store", lambda _: Away(store, lambda *_: True))
    monkeypatch.setattr(gangs, "run_gang", run_gang)
    task = SimpleNamespace(run_url=store.url, request_key="requests/1.json")
    with pytest.raises(KeyboardInterrupt):
        gangs._start_on_ray(task, small_config(steps=5), "gang", lambda: None)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
