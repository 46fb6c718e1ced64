"""Trying again: how often, how long, what not, and when to give up at once."""

from __future__ import annotations

import random
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import LeaseLost, ObjectExists, ObjectMissing, StorageDenied, StorageError, StorageFull
from cluster.storage import Store, open_store
from tasks.training.snapshots.patient_store import PatientStore
from tasks.training.snapshots.upload import PAUSES_SECONDS, Abandoned, Retries
from tests.faulty_store import FaultyStore


class Clock(threading.Event):
    """An event on which nobody waits in vain: it notes how long it was to be."""

    def __init__(self, *, abandon_at: int | None = None) -> None:
        super().__init__()
        self.waits: list[float] = []
        self.abandon_at = abandon_at

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.waits.append(timeout)
        if len(self.waits) == self.abandon_at:
            self.set()
        return self.is_set()


class Flaky:
    """Fails ``count`` times with ``kind``, then answers."""

    def __init__(self, count: int, kind: type[Exception] = StorageError) -> None:
        self.count, self.kind, self.calls = count, kind, 0

    def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self.count:
            raise self.kind("away")
        return "answer"


@pytest.mark.parametrize("count", range(len(PAUSES_SECONDS) + 1))
def test_retries_outlast_as_many_failures_as_there_are_pauses(count: int) -> None:
    clock, work = Clock(), Flaky(count)
    assert Retries(abandon=clock, draws=random.Random(count)).run(work, "it") == "answer"
    assert work.calls == count + 1
    for waited, pause in zip(clock.waits, PAUSES_SECONDS, strict=False):
        assert 0.5 * pause <= waited <= 1.5 * pause
    assert len(clock.waits) == count


def test_retries_raise_the_last_failure_when_all_are_spent() -> None:
    clock, work = Clock(), Flaky(99)
    with pytest.raises(StorageError, match="away"):
        Retries(abandon=clock).run(work, "it")
    assert work.calls == len(PAUSES_SECONDS) + 1
    assert sum(clock.waits) <= 1.5 * sum(PAUSES_SECONDS)


def test_retries_of_ranks_do_not_come_back_together() -> None:
    clocks = [Clock() for _ in range(3)]
    for clock in clocks:
        Retries(abandon=clock).run(Flaky(5), "it")
    assert len({tuple(clock.waits) for clock in clocks}) == 3


@pytest.mark.parametrize("kind", [StorageFull, StorageDenied, ObjectMissing, ObjectExists, LeaseLost, KeyError])
def test_retries_pass_on_at_once_what_time_does_not_mend(kind: type[Exception]) -> None:
    work = Flaky(1, kind)
    with pytest.raises(kind):
        Retries(abandon=Clock()).run(work, "it")
    assert work.calls == 1


def test_retries_end_with_the_pause_in_which_they_became_pointless() -> None:
    clock, work = Clock(abandon_at=2), Flaky(99)
    retries = Retries(abandon=clock)
    with pytest.raises(Abandoned):
        retries.run(work, "it")
    assert work.calls == 2
    with pytest.raises(Abandoned):
        retries.check()


CALLS: dict[str, tuple[Callable[[Store], Any], Any]] = {
    "read": (lambda store: store.read("there"), b"bytes"),
    "read_range": (lambda store: store.read_range("there", 1, 3), b"yt"),
    "open_reader": (lambda store: store.open_reader("there").close(), None),
    "size": (lambda store: store.size("there"), 5),
    "version": (lambda store: store.version("there") == store.version("there"), True),
    "keys": (lambda store: store.keys(), ["there"]),
    "folders": (lambda store: store.folders(""), []),
    "put": (lambda store: store.put("there", b"other"), None),
    "create": (lambda store: store.create("new", b"bytes"), None),
    "replace": (lambda store: store.replace("there", b"other", b"bytes"), True),
    "delete": (lambda store: store.delete("there"), None),
}


@pytest.mark.parametrize("method", CALLS)
def test_patient_store_repeats_each_request_until_it_is_answered(tmp_path: Path, method: str) -> None:
    call, expected = CALLS[method]
    inner, calls = open_store(str(tmp_path)), []
    inner.put("there", b"bytes")

    def fail(called: str, _key: str) -> bool:
        calls.append(called)
        return calls.count(called) <= 2

    store = PatientStore(FaultyStore(inner, fail), Retries(abandon=Clock()))
    assert call(store) == expected
    assert calls.count(method) >= 3


def test_patient_store_answers_that_are_no_failures_are_given_at_once() -> None:
    store = PatientStore(open_store(f"memory://{uuid.uuid4().hex}"), Retries(abandon=Clock()))
    store.child("below").create("key", b"bytes")
    assert store.url == store.child("below").url.removesuffix("/below")
    assert store.read("below/key") == b"bytes"
    assert store.read_if_present("other") is None
    with pytest.raises(ObjectExists):
        store.create("below/key", b"other")
    with pytest.raises(ObjectExists), store.create_stream("below/key") as out:
        out.write(b"other")
    assert not store.replace("below/key", b"new", b"not this")
