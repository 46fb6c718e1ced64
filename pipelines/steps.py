"""Durable steps: what a pipeline consists of, done once each, recorded beside the run so that any driver can go on.

A step's record is one object, ``steps/<name>@<version>.json``, created if absent after the work is done: its presence means
done. It holds the fingerprint of what determines the step's bytes and those values themselves, so that a pipeline started
with other values is refused with the difference. Hosts, paths, times and numbers of workers are no part of it.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, TypeVar

from cluster.errors import ObjectExists, StorageError
from cluster.lease import Lease
from cluster.storage import Store
from configs.errors import UserError
from configs.typed import parse_record
from tasks.checkpoints.digest import fingerprint
from tasks.checkpoints.run_folder import code_version

FOLDER = "steps"
FORMAT_VERSION = 1
_NAME = re.compile(r"[a-z0-9][a-z0-9.-]*")
Context = TypeVar("Context")


class StepChanged(UserError):
    """A step was done with other values; the message shows the difference."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One piece of a sharded step, such as one merge of a schedule; named by what it makes."""

    name: str
    """Unique within its step, the same whoever enumerates it and when."""
    is_done: bool
    """Whether its output is committed."""
    bytes_read: int = 0
    """What it will read."""
    bytes_written: int = 0
    """What it will write."""


@dataclass(frozen=True, kw_only=True)
class Step(Generic[Context]):
    """One durable step of a pipeline."""

    name: str
    """Unique within its pipeline; lower-case letters, digits, dots and dashes."""
    version: int = 1
    """To be raised when the function makes other bytes of the same values."""
    config: Mapping[str, Any]
    """What determines its bytes, as JSON values."""
    needs: tuple[str, ...] = ()
    """Names of the steps whose outputs it uses."""
    function: Callable[[Context], Mapping[str, Any]]
    """Does the work, may be called again after any crash, and returns what the record keeps, as JSON values."""
    units: Callable[[Context], Sequence[Unit]] | None = None
    """For a sharded step: its pieces and which of them are done, from committed manifests alone."""
    is_standing: Callable[[Context, Mapping[str, Any]], bool]
    """Whether the output that the record's result speaks of is there, whole; if not, the step is done again."""

    def __post_init__(self) -> None:
        assert _NAME.fullmatch(self.name), self.name

    @property
    def key(self) -> str:
        """Key of its record below the run."""
        return f"{FOLDER}/{self.name}@{self.version}.json"


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """What a step's record says."""

    name: str
    """Of the step."""
    version: int
    """Of the step."""
    fingerprint: str
    """Of name, version, ``config`` and ``needs``."""
    config: dict[str, Any]
    """What determined the bytes."""
    needs: dict[str, str]
    """Step that it used to that step's fingerprint."""
    result: dict[str, Any]
    """What the function returned."""
    seconds: float
    """How long the work took, of the driver that finished it."""
    finished: float
    """Unix seconds."""
    code_version: str
    """pmaflow that did it."""
    format_version: int = field(default=FORMAT_VERSION)
    """Of this layout."""


def run_steps(
    store: Store,
    steps: Sequence[Step[Context]],
    context: Context,
    lease: Lease,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, StepRecord]:
    """Do what is not done of ``steps``, in order, each after those that it needs; returns their records by name.

    Raises :class:`StepChanged` before any work if a step was done with other values, and
    :class:`cluster.errors.LeaseLost` instead of recording a step once another driver acts on the run.
    """
    standing = read_records(store, steps)
    done: dict[str, StepRecord] = {}
    for step in steps:
        record = standing.get(step.name)
        if record is None or not step.is_standing(context, record.result):
            tell(step.name)
            started = time.perf_counter()
            result = dict(step.function(context))
            lease.check()
            # Done before, but its output went or grew: the values are the same, so the record that stands is true.
            record = record or _commit(store, step, done, result, time.perf_counter() - started)
        done[step.name] = record
    return done


def read_records(store: Store, steps: Sequence[Step[Context]]) -> dict[str, StepRecord]:
    """Records of those of ``steps`` that have one; :class:`StepChanged` lists every difference from what is asked for now."""
    records = {}
    differences: list[str] = []
    fingerprints = fingerprints_of(steps)
    there = set(store.keys(FOLDER))
    for step in steps:
        if step.key not in there:
            continue
        record = _parse(store.read(step.key), f"{store.url}/{step.key}")
        if record.fingerprint != fingerprints[step.name]:
            differences += [f"  {step.name}: {line}" for line in _differences(step, record, fingerprints)]
        records[step.name] = record
    if differences:
        raise StepChanged(
            f"{store.url} has done steps with other values:\n"
            + "\n".join(differences)
            + "\nGive the same values, --fork NAME to branch a new run off, or another --run"
        )
    return records


def pending_steps(store: Store, steps: Sequence[Step[Context]], context: Context) -> list[Step[Context]]:
    """Those of ``steps`` that have something left to do; :class:`StepChanged` as in :func:`read_records`."""
    records = read_records(store, steps)
    return [s for s in steps if s.name not in records or not s.is_standing(context, records[s.name].result)]


def fingerprints_of(steps: Sequence[Step[Context]]) -> dict[str, str]:
    """Fingerprint of each step, by name; ``steps`` are in an order in which each follows what it needs.

    Raises :class:`TypeError` for values that JSON cannot say exactly.
    """
    prints: dict[str, str] = {}
    for step in steps:
        needs = {name: prints[name] for name in step.needs}
        prints[step.name] = _identity(step.name, step.version, step.config, needs)
    return prints


def _identity(name: str, version: int, config: Mapping[str, Any], needs: Mapping[str, str]) -> str:
    return fingerprint({"name": name, "version": version, "config": dict(config), "needs": dict(needs)})


def _commit(
    store: Store,
    step: Step[Context],
    done: Mapping[str, StepRecord],
    result: dict[str, Any],
    seconds: float,
) -> StepRecord:
    needs = {name: done[name].fingerprint for name in step.needs}
    record = StepRecord(
        name=step.name,
        version=step.version,
        fingerprint=_identity(step.name, step.version, step.config, needs),
        config=dict(step.config),
        needs=needs,
        result=result,
        seconds=round(seconds, 3),
        finished=time.time(),
        code_version=code_version(),
    )
    try:
        store.create(step.key, json.dumps(asdict(record), indent=1, allow_nan=False).encode())
    except ObjectExists:
        return _parse(store.read(step.key), f"{store.url}/{step.key}")
    return record


def _parse(data: bytes, url: str) -> StepRecord:
    try:
        values = json.loads(data)
        if values.get("format_version") != FORMAT_VERSION:
            raise StorageError(
                f"{url}: format_version {values.get('format_version')!r}; this version reads {FORMAT_VERSION}"
            )
        record = parse_record(StepRecord, values)
    except (ValueError, TypeError, AttributeError) as error:
        raise StorageError(
            f"{url}: the step record is damaged ({error}); remove it and run the command again"
        ) from error
    if _identity(record.name, record.version, record.config, record.needs) != record.fingerprint:
        raise StorageError(
            f"{url}: the step record was edited: its values do not have its fingerprint; remove it and run the command again"
        )
    return record


def _differences(step: Step[Context], record: StepRecord, fingerprints: Mapping[str, str]) -> list[str]:
    """One line per value that differs between what was done and what is asked for."""
    old, new = dict(record.config), dict(step.config)
    lines = []
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            lines.append(f"{key}: done with {old.get(key)!r}, asked for {new.get(key)!r}")
    for name in sorted(record.needs.keys() | set(step.needs)):
        if name not in step.needs or name not in record.needs:
            lines.append(f"{name}: {'no longer used' if name in record.needs else 'not used then'}")
        elif record.needs[name] != fingerprints[name]:
            lines.append(f"it used {name} as it was done then, which differs from what is asked for now")
    return lines
