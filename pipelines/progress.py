"""Progress from the run's own journal: one live line on a terminal, one line every so often in a log."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TextIO

from cluster.journal import Measurement, journal_keys, read_journal_object
from configs.schema import Config
from pipelines.wording import format_seconds
from tasks.checkpoints.run_folder import RunFolder

LIVE_SECONDS = 1.0
LOG_SECONDS = 15.0
CLEAR_LINE = "\r\x1b[2K"
SPEED = "train/tokens_per_second"


class Progress:
    """Shows step, tokens, loss, speed, time left and what runs beside."""

    def __init__(
        self, run: RunFolder, config: Config, label: str, beside: Callable[[], list[str]], out: TextIO = sys.stderr
    ) -> None:
        self.run, self.config, self.label, self.beside, self.out = run, config, label, beside, out
        self.live = out.isatty()
        self._seen_key = ""
        self._last: Measurement | None = None
        self._printed_step = -1
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True, name="progress")

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=2)
        if self.live:
            self.out.write(CLEAR_LINE)
        self._show()
        if self.live:
            self.out.write("\n")
        self.out.flush()

    def line(self) -> str:
        """The line as it stands now."""
        parts = [self.label]
        last, total = self._last, self.config.training.total_tokens
        if last is None:
            parts.append("starting workers")
        else:
            speed = last.metrics.get(SPEED, 0.0)
            left = (total - last.tokens) / speed if speed else 0.0
            parts += [
                f"step {last.step:,}/{self.config.training.total_steps:,}",
                f"{last.tokens / 1e6:.2f} of {total / 1e6:.2f} M tokens",
                f"loss {last.metrics.get('train/loss', float('nan')):.3f}",
                f"{speed / 1000:.1f} k tokens/s",
                f"ETA {format_seconds(left)}",
            ]
        return " · ".join(parts + self.beside())

    def _loop(self) -> None:
        period = LIVE_SECONDS if self.live else LOG_SECONDS
        while not self._stop.wait(period):
            self._show()

    def _show(self) -> None:
        self._read_newest()
        step = self._last.step if self._last else 0
        if self.live:
            self.out.write(CLEAR_LINE + self.line()[:200])
        elif step != self._printed_step:
            self.out.write(f"{time.strftime('%H:%M:%S')} {self.line()}\n")
        self._printed_step = step
        self.out.flush()

    def _read_newest(self) -> None:
        keys = journal_keys(self.run.store)
        if keys and keys[-1] != self._seen_key:
            # A segment's last words are about its last snapshot, not about a step.
            rows = [row for row in read_journal_object(self.run.store, keys[-1]) if SPEED in row.metrics]
            self._seen_key = keys[-1]
            if rows:
                speeds = sorted(row.metrics[SPEED] for row in rows)
                # The median of the batch: single steps jump.
                self._last = replace(rows[-1], metrics={**rows[-1].metrics, SPEED: speeds[len(speeds) // 2]})
