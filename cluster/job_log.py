"""Follow a Ray job to its end: its log through dropped connections, and how it ended.

The log arrives over a websocket that may break, or fall silent without breaking, at any time; each new
attachment sends the whole log again, and what was shown already is skipped by its length.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import queue
import threading
import time
from collections.abc import Callable

from cluster.errors import ClusterUnreachable, JobFailed
from cluster.jobs import JobServer, JobServerError, JobState, dropped

POLL_SECONDS = 1.0
RETRY_SECONDS = 120.0
"""How long a cluster may be silent before we give up on it."""
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 10.0
SILENCE_SECONDS = 120.0
"""A log silent for longer is attached to anew: a gateway may have forgotten the connection."""
Write = Callable[[str], None]


def follow(
    server: JobServer,
    submission_id: str,
    write: Write,
    *,
    is_driver_alive: Callable[[], bool] = lambda: False,
    retry_seconds: float = RETRY_SECONDS,
) -> JobState:
    """Show the job's log as it grows and return how the job ended.

    Ray may call a job FAILED whose driver it merely lost sight of; then there is no exit code, and the
    job has ended once ``is_driver_alive`` (asked of the run's lease) says so too. Raises
    :class:`ClusterUnreachable` after ``retry_seconds`` without an answer, and :class:`JobFailed` if the
    cluster no longer knows the job.
    """
    patience = Patience(server.url, submission_id, retry_seconds)
    with LogReader(server, submission_id, write) as reader:
        while True:
            reader.show(POLL_SECONDS)
            try:
                state = server.state(submission_id)
            except dropped() as error:
                _raise_if_forgotten(error, submission_id, server.url)
                patience.wait_after(error)
                continue
            patience.renew()
            if state.is_terminal and (state.exit_code is not None or state.status != "FAILED" or not is_driver_alive()):
                reader.finish()
                return state


class Patience:
    """Pauses between tries, growing, until the cluster was silent for too long."""

    def __init__(self, url: str, submission_id: str, seconds: float) -> None:
        self.url, self.submission_id, self.seconds = url, submission_id, seconds
        self.renew()

    def renew(self) -> None:
        """The cluster answered."""
        self._pause, self._since = FIRST_PAUSE_SECONDS, time.monotonic()

    def wait_after(self, error: BaseException) -> None:
        """Pause after a failed request; raises :class:`ClusterUnreachable` when patience ends."""
        if time.monotonic() - self._since > self.seconds:
            raise ClusterUnreachable(
                f"{self.url} has not answered for {self.seconds:.0f} s ({error}); job {self.submission_id} may go on "
                "there. Run the same command again: it attaches to the job if it runs, and continues the run if not"
            ) from error
        time.sleep(self._pause)
        self._pause = min(2 * self._pause, LONGEST_PAUSE_SECONDS)


class LogReader:
    """Shows a job's log once, however often the connection has to be made."""

    def __init__(self, server: JobServer, submission_id: str, write: Write) -> None:
        self.server, self.submission_id, self.write = server, submission_id, write
        self._num_shown = 0
        self._tail: Tail | None = None
        self._heard = self._attach_after = time.monotonic()

    def __enter__(self) -> LogReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._detach()

    def show(self, seconds: float) -> None:
        """Show what arrives within ``seconds``; sooner back if the connection ends."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if self._tail is None:
                if self._attach_after > time.monotonic():
                    time.sleep(min(left, self._attach_after - time.monotonic()))
                    continue
                self._tail = Tail(self.server, self.submission_id, self._num_shown)
                self._heard = time.monotonic()
            try:
                text = self._tail.chunks.get(timeout=left)
            except queue.Empty:
                break
            if text is None:
                self._detach()
                self._attach_after = time.monotonic() + POLL_SECONDS
                return
            self._show(text)
        if time.monotonic() - self._heard > SILENCE_SECONDS:
            self._detach()

    def finish(self) -> None:
        """Show what is left of the log of a job that has ended, or as much of it as the cluster still has."""
        self._detach()
        for _ in range(3):
            try:
                text = self.server.log(self.submission_id)
            except dropped():
                time.sleep(FIRST_PAUSE_SECONDS)
                continue
            self._show(text[self._num_shown :])
            return
        self.write("pma: the end of the log is lost with its node\n")

    def _show(self, text: str) -> None:
        self._heard = time.monotonic()
        self._num_shown += len(text)
        if text:
            self.write(text)

    def _detach(self) -> None:
        if self._tail is not None:
            self._tail.close()
            self._tail = None


class Tail:
    """One attachment to a job's log, on a thread of its own; ``chunks`` ends with None when the connection does."""

    def __init__(self, server: JobServer, submission_id: str, num_shown: int) -> None:
        self.chunks: queue.Queue[str | None] = queue.Queue()
        self._client, self._submission_id, self._skip = server.client, submission_id, num_shown
        self._loop = asyncio.new_event_loop()
        self._task: asyncio.Task[None] | None = None
        threading.Thread(target=self._run, daemon=True, name="job-log").start()

    def close(self) -> None:
        """End the attachment."""
        with contextlib.suppress(RuntimeError):  # the loop has ended by itself
            self._loop.call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._listen())
        finally:
            self._loop.close()
            self.chunks.put(None)

    async def _listen(self) -> None:
        self._task = asyncio.current_task()
        with contextlib.suppress(*dropped(), RuntimeError, asyncio.CancelledError, concurrent.futures.CancelledError):
            async for text in self._client.tail_job_logs(self._submission_id):
                new = text[self._skip :]
                self._skip = max(0, self._skip - len(text))
                if new:
                    self.chunks.put(new)


def _raise_if_forgotten(error: BaseException, submission_id: str, url: str) -> None:
    if isinstance(error, JobServerError) and error.status == 404:
        raise JobFailed(
            f"{url} does not know job {submission_id} any more: the cluster was replaced. "
            "Run the same command again to continue",
            exit_code=1,
        ) from error
