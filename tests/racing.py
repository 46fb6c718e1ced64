"""Threads that do the same thing at the same moment."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from cluster.errors import ObjectExists
from cluster.storage import Store

RACERS = 6


@pytest.fixture
def frequent_switches() -> Iterator[None]:
    """Threads change places after every few bytecodes, so that races that can happen do."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def race(attempt: Callable[[int], bool]) -> list[int]:
    """Run ``attempt`` on :data:`RACERS` threads that start together; the numbers of those that won."""
    start = threading.Barrier(RACERS)

    def run(number: int) -> bool:
        start.wait()
        return attempt(number)

    with ThreadPoolExecutor(RACERS) as pool:
        return [number for number, won in enumerate(pool.map(run, range(RACERS))) if won]


def won(write: Callable[[], object]) -> bool:
    """Whether ``write`` created its object, not another's being there."""
    try:
        write()
    except ObjectExists:
        return False
    return True


def stream(store: Store, key: str, *pieces: bytes) -> None:
    """Write an object piece by piece."""
    with store.create_stream(key) as out:
        for piece in pieces:
            out.write(piece)
