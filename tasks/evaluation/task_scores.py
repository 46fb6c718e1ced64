"""Scores of tasks, on record by the digest of the weights: what lm-evaluation-harness found, with where it belongs."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from cluster.storage import Store
from configs.json_numbers import finite_or_none
from configs.typed import parse_record
from tasks.evaluation.held_out import FOLDER

MARK = "-lm-eval-"


@dataclass(frozen=True, kw_only=True)
class TaskScores:
    """What one set of weights scored in one task or group."""

    digest: str
    """Content digest of the weights."""
    task: str
    """Its name."""
    fingerprint: str
    """Of the task's files, the harness and how it was asked: see :func:`tasks.evaluation.harness.fingerprint_of`."""
    harness: str
    """Version of lm-evaluation-harness."""
    scores: dict[str, dict[str, float | None]]
    """Task, and in a group each of its tasks, to metric to value; ``acc_stderr`` is the error of ``acc``. None: not a number."""
    samples: dict[str, int]
    """Questions asked, by task."""
    step: int | None
    """Completed optimizer steps of the weights, by their manifest."""
    tokens_seen: int | None
    """Tokens seen up to ``step``."""
    created: float
    """Unix seconds."""


def scores_key(digest: str, fingerprint: str) -> str:
    """Key of a record below its run."""
    return f"{FOLDER}/{digest}{MARK}{fingerprint}.json"


def write_scores(store: Store, scores: TaskScores) -> None:
    """Write a record; the same weights score the same, so a second writer changes nothing."""
    data = json.dumps(finite_or_none(dataclasses.asdict(scores)), allow_nan=False).encode()
    store.put(scores_key(scores.digest, scores.fingerprint), data)


def read_scores(store: Store, digest: str, fingerprint: str) -> TaskScores | None:
    """Record of these weights in this task, or None."""
    data = store.read_if_present(scores_key(digest, fingerprint))
    return None if data is None else _parse(json.loads(data))


def all_scores(store: Store) -> list[TaskScores]:
    """Every record of scores that the run has, by digest and task; one read each."""
    keys = [key for key in store.keys(FOLDER) if MARK in key]
    found = [_parse(json.loads(store.read(key))) for key in keys]
    return sorted(found, key=lambda scores: (scores.digest, scores.task, scores.created))


def _parse(values: dict[str, Any]) -> TaskScores:
    return parse_record(TaskScores, values)
