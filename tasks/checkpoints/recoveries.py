"""Recoveries: each one cuts the run back to an earlier point, and everything after that point is left behind.

A recovery is one object, ``recoveries/0001.json``, created once and never changed. From it alone follows which
snapshots are still part of the run: those of before that lie beyond its start are not, though they stay where they are.
Whoever trains on, merges or cleans up asks :func:`living`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from cluster.errors import ObjectExists
from cluster.storage import Store
from configs.errors import UserError
from configs.typed import parse_record
from tasks.checkpoints.start_point import StartPoint
from tasks.data.skips import SkipRange

FOLDER = "recoveries"


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """The decision to go on from an earlier point, and how."""

    number: int
    """From 1 over the run."""
    incident: int
    """Which spike, from 1; several recoveries may be needed for one."""
    attempt: int
    """Which try at this spike, from 1."""
    policy: str
    """What was done: ``pma``, ``rollback``, ``rollback-skip`` or ``by hand``."""
    start: StartPoint
    """Where training goes on: a merge of healthy snapshots, or one of them."""
    count: int
    """Snapshots merged into the start."""
    onset_step: int
    """First step of the trouble."""
    alarm_step: int
    """Step at which training was stopped."""
    reason: str
    """The finding in a sentence."""
    moments: Literal["merge", "newest", "reset"]
    """What became of Adam's moments."""
    learning_rate_scale: float = 1.0
    """Factor on the schedule's learning rate from the start on, those of earlier recoveries included."""
    rewarm_tokens: int = 0
    """Tokens over which the learning rate rises linearly from 0 after the start."""
    skips: tuple[SkipRange, ...] = ()
    """Stretches of the data stream that are never read, earlier recoveries' included."""
    confirm_step: int = 0
    """The spike is over once this step is passed without an alarm."""
    created: float = 0.0
    """Unix seconds."""


class Trodden(Protocol):
    """What is somewhere on a run's way."""

    @property
    def step(self) -> int | None:
        """Completed optimizer steps."""

    @property
    def recovery(self) -> int:
        """Recoveries that were in force when it was made."""


Item = TypeVar("Item", bound=Trodden)


def read_recoveries(store: Store) -> list[Recovery]:
    """Recoveries of the run at ``store``, oldest first; :class:`UserError` names one that is damaged."""
    return [_read(store, key) for key in sorted(store.keys(FOLDER)) if is_record(key)]


def write_recovery(store: Store, recovery: Recovery) -> None:
    """Put the decision on record; raises :class:`cluster.errors.ObjectExists` if there is another of that number."""
    data = json.dumps(dataclasses.asdict(recovery), indent=1, allow_nan=False).encode()
    store.create(f"{FOLDER}/{recovery.number:04d}.json", data)


def write_confirmation(store: Store, number: int, facts: dict[str, Any]) -> bool:
    """Record, once, that the spike of recovery ``number`` is over; False if that was on record."""
    try:
        store.create(f"{FOLDER}/{number:04d}-confirmed.json", json.dumps(facts).encode())
    except ObjectExists:
        return False
    return True


def read_confirmations(store: Store) -> dict[int, dict[str, Any]]:
    """What was recorded of recoveries that held, by number."""
    keys = [key for key in store.keys(FOLDER) if key.endswith("-confirmed.json")]
    return {int(key.rpartition("/")[2].split("-")[0]): json.loads(store.read(key)) for key in keys}


def living(items: Iterable[Item], recoveries: Sequence[Recovery]) -> list[Item]:
    """Those of ``items`` that no later recovery has left behind, in their order."""
    return [
        item for item in items if all(r.number <= item.recovery or (item.step or 0) <= r.start.step for r in recoveries)
    ]


def folder_suffix(recovery: int) -> str:
    """What tells the folders of a step that is trodden again from those of the first time."""
    return f"-r{recovery:02d}" if recovery else ""


def is_record(key: str) -> bool:
    """Whether ``key`` holds a decision, not its confirmation."""
    return key.endswith(".json") and not key.endswith("-confirmed.json")


def _read(store: Store, key: str) -> Recovery:
    try:
        return parse_record(Recovery, json.loads(store.read(key)))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{store.url}/{key} is damaged: {type(error).__name__}: {error}") from error
