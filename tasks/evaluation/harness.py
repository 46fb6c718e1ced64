"""lm-evaluation-harness as a program beside ours: asked what it knows, run on one checkpoint, its results read.

It is no dependency: it lives in this environment (``pip install 'pmaflow[lm-eval]'``) or in another, whose Python is named. Runs
that ask local tasks alone touch no network and leave no cache behind.
"""

from __future__ import annotations

import difflib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import UserError
from tasks.checkpoints.digest import fingerprint
from tasks.evaluation.task_files import AskedTask, names_of, shipped_names

INSTALL = "pip install 'pmaflow[lm-eval]'"
PROBE = """
import difflib, importlib.metadata, json, sys
version, unknown = importlib.metadata.version("lm_eval"), {}
if sys.argv[1:]:
    from lm_eval.tasks import TaskManager
    known = set(TaskManager().all_tasks)
    unknown = {name: difflib.get_close_matches(name, known, n=1) for name in sys.argv[1:] if name not in known}
print(json.dumps({"version": version, "unknown": unknown}))
"""
"""What the harness's Python is asked first: that it is there, which one it is, and which of the names it does not know."""
PROBE_SECONDS = 300
"""Importing it and looking through its 15,000 tasks takes ten seconds; on a busy machine much more."""


class HarnessFailed(Exception):
    """The harness ended with an error on one checkpoint, or without results; the message ends with its last words."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """What one run of the harness found."""

    scores: dict[str, dict[str, float | None]]
    """Task or group to metric to value; None for what is no number."""
    samples: dict[str, int]
    """Questions asked, by task."""
    members: dict[str, list[str]]
    """Group to its tasks and groups."""

    def of(self, name: str) -> dict[str, dict[str, float | None]]:
        """Scores of the task or group ``name`` and of all below it."""
        below = {task: found for member in self.members.get(name, []) for task, found in self.of(member).items()}
        return ({name: self.scores[name]} if self.scores.get(name) else {}) | below


def probe_harness(python: str, tasks: Sequence[AskedTask]) -> str:
    """Version of the harness that ``python`` has.

    Raises :class:`configs.errors.UserError` in one line if it has none, or if the harness does not know one of the tasks that
    are neither ours nor files.
    """
    try:
        done = _run([python, "-c", PROBE, *names_of(tasks)], Path.cwd(), {}, PROBE_SECONDS)
    except OSError as error:
        raise UserError(f"--lm-eval-python {python}: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"--lm-eval-python {python}: no answer within {PROBE_SECONDS} s") from None
    if done.returncode:
        raise UserError(
            f"{python} has no lm-evaluation-harness ({_last_words(done.stderr)}); {INSTALL}, or name the Python of an "
            "environment that has it with --lm-eval-python PATH"
        )
    answer = json.loads(done.stdout.splitlines()[-1])
    for name, known in answer["unknown"].items():
        near = difflib.get_close_matches(name, [*shipped_names(), *known], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(
            f"--tasks: no task {name!r} ships, lies at that path or is known to lm-evaluation-harness {answer['version']}{hint}"
        )
    return str(answer["version"])


def fingerprint_of(task: AskedTask, version: str, dtype: str) -> str:
    """Of all that decides the scores of given weights, but for the machine."""
    values = {"task": task.name, "files": task.files, "harness": version, "dtype": dtype}
    return fingerprint(values)[:16]


def run_harness(
    python: str, model: Path, tasks: Sequence[AskedTask], *, dtype: str, batch_sequences: int
) -> dict[str, Results]:
    """Results by task name of the Hugging Face folder ``model``; one process for each folder that tasks lie in.

    Its working directory is that folder, so that task files name their data as they lie beside them. Raises
    :class:`HarnessFailed`.
    """
    found: dict[str, Results] = {}
    for folder in dict.fromkeys(task.folder for task in tasks):
        names = [task.name for task in tasks if task.folder == folder]
        with tempfile.TemporaryDirectory(prefix="pma-lm-eval-") as scratch:
            command = [
                python, "-m", "lm_eval", "run", "--model", "hf",
                "--model_args", f"pretrained={model},dtype={dtype}",
                "--tasks", ",".join(names),
                "--batch_size", str(batch_sequences),
                "--output_path", f"{scratch}/results",
                *(["--include_path", str(folder)] if folder else []),
            ]  # fmt: skip
            done = _run(command, folder or Path(scratch), _offline(Path(scratch)) if folder else {}, None)
            files = sorted(Path(scratch, "results").rglob("results_*.json"))
            if done.returncode or not files:
                raise HarnessFailed(f"lm-evaluation-harness failed on {','.join(names)}: {_last_words(done.stderr)}")
            results = parse_results(json.loads(files[-1].read_text()))
        for name in names:
            if not results.of(name):
                raise HarnessFailed(f"lm-evaluation-harness gave no score for {name}")
            found[name] = results
    return found


def parse_results(values: Mapping[str, Any]) -> Results:
    """Scores of a results file of lm-evaluation-harness 0.4: ``acc,none`` is ``acc``, ``acc,other`` stays ``acc,other``."""
    scores = {
        task: {
            metric.removesuffix(",none"): float(value) if isinstance(value, (int, float)) else None
            for metric, value in found.items()
            if "," in metric
        }
        for task, found in values["results"].items()
    }
    return Results(
        scores={task: found for task, found in scores.items() if found},
        samples={task: int(count["effective"]) for task, count in values.get("n-samples", {}).items()},
        members={group: list(members) for group, members in values.get("group_subtasks", {}).items()},
    )


def default_python() -> str:
    """The Python of this environment."""
    return sys.executable


def _offline(scratch: Path) -> dict[str, str]:
    """For tasks that lie here: nothing is fetched, and what is cached goes with the run."""
    return {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(scratch / "cache")}


def _run(
    command: Sequence[str], folder: Path, environment: Mapping[str, str], seconds: float | None
) -> subprocess.CompletedProcess[str]:
    # PYTHONSAFEPATH: a folder of tasks may hold a file that is called like a module.
    env = {**os.environ, "PYTHONSAFEPATH": "1", "TOKENIZERS_PARALLELISM": "false", **environment}
    return subprocess.run(  # noqa: S603  the user's own Python
        list(command),
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=seconds,
        check=False,
    )


def _last_words(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:500] if lines else "it said nothing"
