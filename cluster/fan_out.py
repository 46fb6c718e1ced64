"""One bounded fan-out: run a function on many items as Ray tasks or local threads, results as they complete.

Functions get names and ranges and return receipts; big bytes go through storage, never through Ray.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from cluster.labels import label_selector

PR_SET_PDEATHSIG = 1
POLL_SECONDS = 0.5
"""Between two looks at whether to go on."""
Item = TypeVar("Item")
Result = TypeVar("Result")


def fan_out_local(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    num_workers: int,
    should_cancel: Callable[[], bool] = lambda: False,
) -> Iterator[Result]:
    """Run on ``num_workers`` threads of this process, in order of completion; the first error cancels what waits.

    ``should_cancel`` is asked between results; then what has not begun is cancelled and
    :class:`concurrent.futures.CancelledError` is raised once what has begun has ended.
    """
    with concurrent.futures.ThreadPoolExecutor(num_workers, thread_name_prefix="fan-out") as pool:
        yield from _as_completed([pool.submit(function, item) for item in items], should_cancel)


def fan_out_processes(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    num_workers: int,
    should_cancel: Callable[[], bool] = lambda: False,
) -> Iterator[Result]:
    """Run on ``num_workers`` fresh processes of this machine, otherwise as :func:`fan_out_local`.

    ``function`` and items are pickled between our own processes.
    """
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(num_workers, mp_context=context, initializer=_die_with_parent) as pool:
        yield from _as_completed([pool.submit(function, item) for item in items], should_cancel)


def fan_out_ray(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    num_in_flight: int,
    num_cpus: int = 1,
    memory_bytes: Callable[[Item], int] = lambda _: 0,
    should_cancel: Callable[[], bool] = lambda: False,
    nodes: str | None = None,
) -> Iterator[Result]:
    """Run each item as a Ray task of ``num_cpus`` CPUs, spread over nodes (of the label ``nodes``), at most ``num_in_flight`` at once.

    ``memory_bytes`` is admission control: Ray starts a task only where that much is free. Lost workers
    are retried by Ray, errors of ours are not. ``should_cancel`` is asked between results; then what
    is outstanding is cancelled and :class:`concurrent.futures.CancelledError` is raised.
    """
    import ray

    # Ray sets OMP_NUM_THREADS to num_cpus in the task: two threads on busy cores collapse.
    remote = ray.remote(num_cpus=num_cpus, scheduling_strategy="SPREAD", max_retries=3)(_call)
    placement = {} if nodes is None else {"label_selector": label_selector(nodes)}
    waiting = list(items)
    running: list[Any] = []
    try:
        while waiting or running:
            while waiting and len(running) < num_in_flight:
                item = waiting.pop(0)
                running.append(remote.options(memory=memory_bytes(item) or None, **placement).remote(function, item))
            done, running = ray.wait(running, num_returns=1, timeout=POLL_SECONDS)
            for reference in done:
                yield ray.get(reference)
            if should_cancel():
                raise concurrent.futures.CancelledError
    finally:
        for reference in running:
            ray.cancel(reference)


def _die_with_parent() -> None:
    """Ask the kernel to end this process when its parent ends: a killed driver must leave no worker waiting for ever."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is None or os.getppid() != parent.pid:
        os._exit(1)  # it ended before the kernel was asked


def _as_completed(
    futures: list[concurrent.futures.Future[Result]], should_cancel: Callable[[], bool]
) -> Iterator[Result]:
    pending = set(futures)
    try:
        while pending:
            done, pending = concurrent.futures.wait(
                pending, timeout=POLL_SECONDS, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in done:
                yield future.result()
            if should_cancel():
                raise concurrent.futures.CancelledError
    finally:
        for future in futures:
            future.cancel()


def _call(function: Callable[[Any], Any], item: Any) -> Any:
    return function(item)
