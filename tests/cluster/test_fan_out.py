"""The local fan-out: every result, the first error, nothing more started after it."""

from __future__ import annotations

import concurrent.futures
import threading

import pytest

from cluster.fan_out import fan_out_local


@pytest.mark.parametrize("num_workers", [1, 3])
def test_fan_out_local_gives_every_result_once(num_workers: int) -> None:
    assert sorted(fan_out_local(lambda x: x * x, list(range(20)), num_workers=num_workers)) == [
        x * x for x in range(20)
    ]


def test_fan_out_local_no_items_gives_nothing() -> None:
    assert list(fan_out_local(lambda x: x, [], num_workers=2)) == []


def test_fan_out_local_runs_at_most_num_workers_at_once() -> None:
    running, most, lock = 0, 0, threading.Lock()
    both_in = threading.Barrier(2)

    def work(item: int) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        both_in.wait()
        with lock:
            running -= 1
        return item

    assert sorted(fan_out_local(work, list(range(6)), num_workers=2)) == list(range(6))
    assert most == 2


def test_fan_out_local_results_come_as_they_complete() -> None:
    slow_may_end = threading.Event()

    def work(item: str) -> str:
        if item == "slow":
            slow_may_end.wait()
        return item

    results = fan_out_local(work, ["slow", "quick"], num_workers=2)
    assert next(results) == "quick"
    slow_may_end.set()
    assert next(results) == "slow"


def test_fan_out_local_first_error_is_raised_and_cancels_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    items = list(range(10))
    started = []
    cancelled = threading.Semaphore(0)
    cancel = concurrent.futures.Future.cancel

    def counted_cancel(future: concurrent.futures.Future[int]) -> bool:
        done = cancel(future)
        cancelled.release()
        return done

    def work(item: int) -> int:
        started.append(item)
        if item == 1:
            raise RuntimeError("on purpose")
        if item == 2:
            # Stay busy until everything behind was cancelled; the limit only ends a test that fails.
            for _ in items:
                assert cancelled.acquire(timeout=10)
        return item

    monkeypatch.setattr(concurrent.futures.Future, "cancel", counted_cancel)
    with pytest.raises(RuntimeError, match="on purpose"):
        list(fan_out_local(work, items, num_workers=1))
    assert started in ([0, 1], [0, 1, 2])
