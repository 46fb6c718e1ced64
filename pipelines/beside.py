"""What runs beside training: merges as their windows complete, and evaluations of what was committed.

Both ask committed manifests alone what is due, so a driver that was away catches up, and nothing is
done twice. For the same reason storage that fails costs no more than a pause: what is due stays due.
"""

from __future__ import annotations

import concurrent.futures
import logging
import threading
import time
from collections.abc import Callable

from cluster.errors import LeaseLost, StorageError
from configs.schema import Config
from pipelines.scheduled import EVALUATION_BATCH, due_now, evaluate_all, make_merges, on_ray, unevaluated
from tasks.checkpoints.run_folder import RunFolder

POLL_SECONDS = 0.7
PAUSES_SECONDS = (2.0, 5.0, 15.0, 30.0, 60.0)
"""After failures of storage in a row; the last again and again while training goes on, and once when it is over."""
logger = logging.getLogger(__name__)


class Beside:
    """Two threads beside training: one merges, one evaluates."""

    def __init__(self, run: RunFolder, config: Config, *, merges: bool = True) -> None:
        self.run, self.config = run, config
        self.activity: dict[str, str] = {}
        self.seconds: dict[str, float] = {"merge": 0.0, "evaluate": 0.0}
        self._training_done = threading.Event()
        self._cancelled = threading.Event()
        self._errors: list[BaseException] = []
        bodies = [("evaluate", self._evaluate_pending)] + ([("merge", self._merge_due)] if merges else [])
        self._threads = [
            threading.Thread(target=self._loop, args=(name, body), daemon=True, name=name) for name, body in bodies
        ]

    def __enter__(self) -> Beside:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._cancelled.set()
        self._training_done.set()
        for thread in self._threads:
            thread.join(timeout=10)

    def finish(self, name: str | None = None) -> None:
        """Wait until everything due is merged (``merge``), evaluated (``evaluate``), or both; raises what went wrong.

        Storage that fails raises once it outlasted :data:`PAUSES_SECONDS`.
        """
        self._training_done.set()
        for thread in self._threads:
            while thread.is_alive() and name in (None, thread.name):
                thread.join(timeout=0.2)
        if self._errors:
            raise self._errors[0]

    def _loop(self, name: str, body: Callable[[], int]) -> None:
        failures = 0
        try:
            while not self._cancelled.is_set():
                final = self._training_done.is_set()
                started = time.perf_counter()
                try:
                    worked = body()
                except (StorageError, LeaseLost, concurrent.futures.CancelledError) as error:
                    # An outage also ends a merge by its pins or its own lease, which cancel its tasks.
                    if self._cancelled.is_set():
                        return
                    failures = self._pause_after(name, error, failures, final=final)
                    continue
                failures = 0
                if worked:
                    self.seconds[name] += time.perf_counter() - started
                elif final and self._is_last(name):
                    return
                else:
                    self._training_done.wait(POLL_SECONDS) if not final else time.sleep(POLL_SECONDS)
        except Exception as error:  # noqa: BLE001  a thread's edge: kept, and raised in the driver by finish()
            logger.error("%s failed: %s", name, error)
            self._errors.append(error)

    def _pause_after(self, name: str, error: Exception, failures: int, *, final: bool) -> int:
        """Pause before another attempt, and return how many failed; ``final``: raise ``error`` if there were enough."""
        self.activity.pop(name, None)
        if final and failures >= len(PAUSES_SECONDS):
            raise error
        seconds = PAUSES_SECONDS[min(failures, len(PAUSES_SECONDS) - 1)]
        logger.warning("%s failed (%s); trying again in %.0f s", name, error, seconds)
        if final:
            self._cancelled.wait(seconds)
        elif self._training_done.wait(seconds):
            # However long it failed beside training, what comes after has attempts of its own.
            return 0
        return failures + 1

    def _is_last(self, name: str) -> bool:
        """The evaluator outlives the merger, whose results it evaluates."""
        return name == "merge" or not any(thread.is_alive() for thread in self._threads if thread.name == "merge")

    def _merge_due(self) -> int:
        due = due_now(self.run, self.config)
        if not due:
            return 0
        outcome = make_merges(self.run, self.config, due, on_ray(self.config, self._cancelled.is_set), self._tell_merge)
        self.activity.pop("merge", None)
        if outcome.failed:
            raise next(iter(outcome.failed.values()))
        for name, reason in outcome.held.items():
            logger.info("%s is left to another driver: %s", name, reason)
        if outcome.held and not outcome.merged:
            # Others are making them; look again when they may have ended.
            self._cancelled.wait(POLL_SECONDS)
        return len(due)

    def _tell_merge(self, name: str) -> None:
        self.activity["merge"] = f"merging {name}"

    def _evaluate_pending(self) -> int:
        if not self.config.evaluation.while_training and not self._training_done.is_set():
            return 0
        urls = unevaluated(self.run, self.config)
        # While training goes on, few at a time: the newest merge is what people wait for.
        chosen = urls if self._training_done.is_set() else urls[:EVALUATION_BATCH]
        if chosen:
            self.activity["evaluate"] = f"evaluating {len(urls)}"
            evaluate_all(self.run, self.config, chosen, self._cancelled.is_set)
            self.activity.pop("evaluate", None)
        return len(chosen)
