"""Fill buffers in order while earlier ones are still being used: I/O beside arithmetic, in bounded memory."""

from __future__ import annotations

import concurrent.futures
from collections import deque
from collections.abc import Callable, Iterable, Iterator

Fill = Callable[[memoryview], int]
"""Fills the front of a buffer and returns how many bytes it wrote."""


def fill_ahead(fills: Iterable[Fill], *, num_buffers: int, buffer_bytes: int) -> Iterator[memoryview]:
    """Run ``fills`` in order and yield what each wrote, at most ``num_buffers`` of them ahead of the consumer.

    With one buffer everything runs in the calling thread: right for local files, which the kernel reads ahead.
    With more, each buffer has a thread: right where a read waits for a network. A yielded view is valid until
    the next one is asked for.
    """
    buffers = [memoryview(bytearray(buffer_bytes)) for _ in range(num_buffers)]
    if num_buffers == 1:
        for fill in fills:
            yield buffers[0][: fill(buffers[0])]
        return
    waiting = iter(fills)
    running: deque[tuple[concurrent.futures.Future[int], memoryview]] = deque()
    with concurrent.futures.ThreadPoolExecutor(num_buffers, thread_name_prefix="read-ahead") as pool:
        try:
            for buffer, fill in zip(buffers, waiting, strict=False):
                running.append((pool.submit(fill, buffer), buffer))
            while running:
                future, buffer = running.popleft()
                yield buffer[: future.result()]
                for fill in waiting:
                    running.append((pool.submit(fill, buffer), buffer))
                    break
        finally:
            for future, _ in running:
                future.cancel()
