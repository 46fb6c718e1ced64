"""Tasks of lm-evaluation-harness for the checkpoints of a run; what is on record is not asked again."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.schema import Config
from tasks.checkpoints.reader import open_checkpoint
from tasks.checkpoints.run_folder import RunFolder
from tasks.evaluation.harness import HarnessFailed, default_python, fingerprint_of, probe_harness, run_harness
from tasks.evaluation.load_ahead import FAILURES
from tasks.evaluation.model_folder import write_model_folder
from tasks.evaluation.task_files import AskedTask, find_tasks
from tasks.evaluation.task_scores import TaskScores, read_scores, scores_key, write_scores


@dataclass(frozen=True, kw_only=True)
class Harness:
    """Tasks that were asked for, looked up, and a harness that knows them."""

    python: str
    """Its Python."""
    version: str
    """Its version."""
    tasks: tuple[AskedTask, ...]
    """What it is asked."""

    def lacks(self, digest: str, done: set[str], config: Config) -> bool:
        """Whether one of the tasks has no record for ``digest`` among the keys ``done``."""
        return any(scores_key(digest, self._fingerprint(task, config)) not in done for task in self.tasks)

    def score(self, run: RunFolder, config: Config, url: str, digest: str) -> dict[str, Any]:
        """Field ``tasks`` of the answer for the checkpoint at ``url``, or ``ok`` and ``error`` if it could not be asked.

        Tasks without a record are asked in one run of the harness on this machine, and recorded.
        """
        known = {task.name: read_scores(run.store, digest, self._fingerprint(task, config)) for task in self.tasks}
        todo = [task for task in self.tasks if known[task.name] is None]
        if todo:
            try:
                known |= self._ask(run, config, url, digest, todo)
            except (HarnessFailed, *FAILURES) as error:
                return {"ok": False, "error": str(error)}
        scores = {name: found for record in known.values() if record for name, found in record.scores.items()}
        return {"tasks": scores, "tasks_reused": len(self.tasks) - len(todo)}

    def _ask(
        self, run: RunFolder, config: Config, url: str, digest: str, tasks: list[AskedTask]
    ) -> dict[str, TaskScores]:
        checkpoint = open_checkpoint(url)
        with tempfile.TemporaryDirectory(prefix="pma-model-") as folder:
            write_model_folder(checkpoint, config.data, Path(folder))
            results = run_harness(
                self.python,
                Path(folder),
                tasks,
                dtype=config.evaluation.dtype,
                batch_sequences=config.evaluation.batch_sequences,
            )
        manifest, found = checkpoint.manifest, {}
        for task in tasks:
            scores = results[task.name].of(task.name)
            found[task.name] = TaskScores(
                digest=digest,
                task=task.name,
                fingerprint=self._fingerprint(task, config),
                harness=self.version,
                scores=scores,
                samples={name: n for name, n in results[task.name].samples.items() if name in scores},
                step=manifest.step if manifest else None,
                tokens_seen=manifest.tokens_seen if manifest else None,
                created=time.time(),
            )
            write_scores(run.store, found[task.name])
        return found

    def _fingerprint(self, task: AskedTask, config: Config) -> str:
        return fingerprint_of(task, self.version, config.evaluation.dtype)


def open_harness(asked: str, python: str | None) -> Harness:
    """Look up the tasks ``asked`` and the harness, before anything is run; :class:`configs.errors.UserError` if one is not there."""
    tasks = find_tasks(asked)
    interpreter = python or default_python()
    return Harness(python=interpreter, version=probe_harness(interpreter, tasks), tasks=tuple(tasks))
