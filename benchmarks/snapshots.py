"""What a snapshot in flight costs the steps beside it: ``python -m benchmarks.snapshots --megabytes 512``.

One rank, one thread of computation; the upload's threads find a core of their own only if the machine has one to spare.
Two kinds of step: ``python`` is a thousand small tensor operations, bound by Python's lock, the worst case for threads
beside it; ``matmul`` is a few large products, which hold no lock.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.distributed import HashStore

from cluster.storage import open_store
from tasks.checkpoints import writer as writer_module
from tasks.checkpoints.manifest import LossStatistics
from tasks.training.snapshots.board import SnapshotBoard
from tasks.training.snapshots.facts import SnapshotFacts
from tasks.training.snapshots.flight import Flight, Terms
from tasks.training.snapshots.share import HostShare
from tasks.training.snapshots.writer import SnapshotWriter

TENSOR_BYTES = 16 << 20
WARM_SECONDS, QUIET_SECONDS = 1.0, 5.0


def python_step() -> None:
    """A thousand operations on sixteen numbers."""
    value = torch.zeros(16)
    for _ in range(1000):
        value = value + 1.0


def matmul_step() -> None:
    """Products of 512 by 512."""
    value = torch.ones(512, 512)
    for _ in range(4):
        value = value @ value * 1e-3


STEPS = {"python": python_step, "matmul": matmul_step}


def steps_while(goes_on: Callable[[], bool], step: Callable[[], None]) -> list[float]:
    """Seconds of every step taken while ``goes_on``."""
    found = []
    while goes_on():
        started = time.perf_counter()
        step()
        found.append(time.perf_counter() - started)
    return found


def for_seconds(seconds: float) -> Callable[[], bool]:
    """A condition that holds so long."""
    ends_at = time.perf_counter() + seconds
    return lambda: time.perf_counter() < ends_at


def begin(url: str, megabytes: int, number: int) -> SnapshotWriter:
    """A writer with a snapshot of ``megabytes`` on its way to ``url``: a third weights, the rest moments."""
    writer = SnapshotWriter(open_store(url), Terms(board=SnapshotBoard(HashStore(), 0, 1), check_lease=lambda: None))
    tensors = {f"w{i}": torch.randn(TENSOR_BYTES // 4) for i in range(megabytes * (1 << 20) // TENSOR_BYTES)}
    third = len(tensors) // 3
    model, state = dict(list(tensors.items())[:third]), dict(list(tensors.items())[third:])
    loss = LossStatistics(mean=1.0, maximum=1.0, last=1.0, gradient_norm_mean=1.0, steps=1, nonfinite_steps=0)
    facts = SnapshotFacts(
        key=f"snapshots/{number}", step=number, tokens_seen=1, phase="stable", learning_rate=1.0, loss=loss, scalars={},
        files={}, run_id="benchmark", segment=1,
    )  # fmt: skip
    writer.begin(HostShare(number=1, of=1, model=model, state=state), facts)
    return writer


def upload_elsewhere(url: str, megabytes: int, number: int, ended: Event) -> None:
    """The same snapshot by a process of its own, which takes the same time of the processor and no lock of ours."""
    torch.set_num_threads(1)
    begin(url, megabytes, number).finish()
    ended.set()


class Account:
    """Processor time of the uploading thread: all of it, and that spent hashing and writing, which hold no lock of Python's."""

    def __init__(self) -> None:
        self.total = self.unlocked = 0.0

    def watch(self, stack: ExitStack) -> None:
        """Take part in every upload for the length of ``stack``."""
        hasher, work = writer_module.new_hasher, Flight._work
        account = self

        class Hasher:
            def __init__(self) -> None:
                self._inner = hasher()
                self.hexdigest = self._inner.hexdigest

            def update(self, data: bytes) -> None:
                account.unlocked += _thread_seconds(lambda: self._inner.update(data))

        def put(self: Any, data: bytes) -> None:
            self._whole.update(data)
            account.unlocked += _thread_seconds(lambda: self._out.write(data))

        def whole(self: Flight) -> None:
            account.total += _thread_seconds(lambda: work(self))

        stack.enter_context(mock.patch.object(writer_module, "new_hasher", Hasher))
        stack.enter_context(mock.patch.object(writer_module.ShardWriter, "_put", put))
        stack.enter_context(mock.patch.object(Flight, "_work", whole))


def account_for(url: str, megabytes: int, number: int) -> dict[str, float | str]:
    """Processor seconds of one upload; they do not depend on what else the machine does."""
    account = Account()
    with ExitStack() as stack:
        account.watch(stack)
        metrics = begin(url, megabytes, number).finish()
    return {
        "megabytes": megabytes,
        "cpu_seconds": account.total,
        "cpu_seconds_holding_the_lock_at_most": account.total - account.unlocked,
        "upload_seconds": metrics["snapshot/upload_seconds"],
    }


def measure(url: str, kind: str, megabytes: int, number: int) -> dict[str, float | str]:
    """Steps of ``kind`` alone, beside a snapshot to ``url``, and beside one that another process writes."""
    step = STEPS[kind]
    steps_while(for_seconds(WARM_SECONDS), step)
    quiet = steps_while(for_seconds(QUIET_SECONDS), step)
    writer = begin(url, megabytes, number)
    beside = steps_while(lambda: writer.is_busy, step)
    metrics = writer.finish()
    polls = [_seconds_of(writer.poll) for _ in range(10_000)]
    context = multiprocessing.get_context("spawn")
    ended = context.Event()
    other = context.Process(target=upload_elsewhere, args=(url, megabytes, number + 1, ended))
    other.start()
    elsewhere = steps_while(lambda: not ended.is_set(), step)
    other.join()
    return {
        "storage": url.split("://", maxsplit=1)[0] if "://" in url else "file",
        "step": kind,
        "megabytes": megabytes,
        "load_1min": os.getloadavg()[0],
        "step_ms_quiet": 1e3 * statistics.median(quiet),
        "step_ms_beside": 1e3 * statistics.median(beside),
        "step_ms_elsewhere": 1e3 * statistics.median(elsewhere[-len(beside) :]),
        "poll_us": 1e6 * statistics.median(polls),
        "upload_seconds": metrics["snapshot/upload_seconds"],
        "commit_seconds": metrics["snapshot/commit_seconds"],
    }


def _thread_seconds(call: Callable[[], object]) -> float:
    started = time.thread_time()
    call()
    return time.thread_time() - started


def _seconds_of(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


@contextmanager
def _s3(folder: Path) -> Iterator[str]:
    from tests.s3_server import BUCKET, s3_server

    folder.mkdir()
    with s3_server(folder) as environment:
        os.environ.update(environment)
        yield f"s3://{BUCKET}/benchmark"


def main() -> None:
    """Print one JSON object a measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        urls = [str(folder / "run"), stack.enter_context(_s3(folder / "s3"))]
        cases = [(url, kind) for url in urls for kind in ("python", "matmul")]
        for number in range(arguments.repeats):
            row = account_for(urls[0], arguments.megabytes, 1_000_000 + number)
            print(json.dumps(row), flush=True)
        for number in range(arguments.repeats):
            for place, (url, kind) in enumerate(cases):
                row = measure(url, kind, arguments.megabytes, 1 + 2 * (number * len(cases) + place))
                print(
                    json.dumps({key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()}), flush=True
                )


if __name__ == "__main__":
    main()
