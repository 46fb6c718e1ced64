"""Read batches beside training: the next steps' rows are being fetched while this one computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from tasks.data.skips import SkipRange
from tasks.workload import Batches, Rows


class Prefetcher:
    """One rank's rows of consecutive steps, ``depth`` steps ahead of the one that asks.

    What is read does not depend on it: step k gives the same rows as ``stream.read`` at the same position. An error of
    a read is raised by the :meth:`take` that needs it. Use it as a context manager, or call :meth:`close`.
    """

    def __init__(
        self,
        stream: Batches,
        *,
        first_step: int,
        batch_sequences: int,
        rank: int,
        world_size: int,
        skips: Sequence[SkipRange] = (),
        depth: int = 2,
        end_step: int | None = None,
    ) -> None:
        """``first_step`` is the first that is taken (from 0), ``batch_sequences`` the global batch; nothing is read from ``end_step`` on."""
        if batch_sequences % world_size:
            raise ValueError(f"{batch_sequences} sequences cannot be shared by {world_size} ranks")
        if depth < 1:
            raise ValueError(f"a depth of {depth}: at least one step is read ahead")
        self._stream, self._skips = stream, tuple(skips)
        self._batch, self._share, self._rank = batch_sequences, batch_sequences // world_size, rank
        self._next_step, self._next_read, self._end = first_step, first_step, end_step
        self._depth = depth
        # One thread keeps reads in order of need; a read of a remote row is itself several at once.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._running: deque[Future[Rows]] = deque()
        self._fill(least=0)

    def take(self, step: int) -> Rows:
        """The rows of this rank of the global batch of ``step``; steps are taken one after the other.

        Raises what :meth:`tasks.workload.Batches.read` raises; the same step may then be asked for again.
        """
        if step != self._next_step:
            raise ValueError(f"step {step} was asked for, {self._next_step} is next")
        self._fill(least=1)
        try:
            batch = self._running[0].result()
        except BaseException:
            self._drop()
            raise
        self._running.popleft()
        self._next_step += 1
        self._fill(least=0)
        return batch

    def close(self) -> None:
        """Drop what is read ahead and wait for the read in flight; the stream stays open."""
        self._drop()
        self._pool.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _fill(self, *, least: int) -> None:
        """Start reads up to the depth, but beyond the last step only as many as ``least`` asks for."""
        while len(self._running) < self._depth:
            if self._end is not None and self._next_read >= self._end and len(self._running) >= least:
                return
            first = self._next_read * self._batch + self._rank * self._share
            self._running.append(self._pool.submit(self._stream.read, first, self._share, self._skips))
            self._next_read += 1

    def _drop(self) -> None:
        while self._running:
            self._running.pop().cancel()
        self._next_read = self._next_step
