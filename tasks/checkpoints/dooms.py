"""What retention is taking away, and what it took: one small object of the run, read by whoever is about to read inputs.

A doom is announced here before anything is deleted, so that a reader who pinned its inputs first and looks here second
knows: either retention saw the pin, or the doom is to be seen (docs/design/06-retention.md).
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

from cluster.errors import LeaseLost, ObjectExists, StorageError
from cluster.storage import Store
from configs.typed import parse_record
from tasks.checkpoints.manifest import MANIFEST_KEY

DOOMS_KEY = "retention/dooms.json"
FORMAT_VERSION = 1


class Commit(Protocol):
    """What tells one commit from a later one of the same name."""

    @property
    def digest(self) -> str:
        """Content digest of the model part."""

    @property
    def created(self) -> float:
        """Unix seconds."""


class HasUrl(Protocol):
    """A checkpoint of a run."""

    @property
    def url(self) -> str:
        """Its folder."""


Listed = TypeVar("Listed", bound=HasUrl)


@dataclass(frozen=True, kw_only=True)
class Doom:
    """One checkpoint that retention takes away."""

    name: str
    """Its folder below the run, such as ``snapshots/step-000001000``."""
    step: int | None
    """Its step."""
    digest: str
    """Content digest of its model part."""
    created: float
    """When it was committed: with the digest, this commit and no later one of the same name."""
    token: str
    """Of the lease under which it was doomed."""
    doomed_at: float
    """Unix seconds."""
    collected_at: float | None = None
    """Unix seconds when its last object was deleted; None while it is being taken away."""

    def is_of(self, commit: Commit | None) -> bool:
        """Whether this speaks of ``commit``; of one that is not known, it is taken to."""
        return commit is None or (commit.digest, commit.created) == (self.digest, self.created)


class DoomList:
    """The dooms of a run as one reader or writer saw them last."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.dooms: dict[str, Doom] = {}
        self._seen: bytes | None = None
        self.read()

    def read(self) -> dict[str, Doom]:
        """Dooms by name, as they are now; :class:`StorageError` if the object is damaged."""
        self._seen = self.store.read_if_present(DOOMS_KEY)
        self.dooms = {} if self._seen is None else _parse(self._seen, f"{self.store.url}/{DOOMS_KEY}")
        return self.dooms

    def write(self, dooms: Iterable[Doom]) -> None:
        """Replace the list that was read; :class:`LeaseLost` if another wrote it meanwhile."""
        rows = {doom.name: doom for doom in dooms}
        data = _encode(rows)
        if data == self._seen or (not rows and self._seen is None):
            return
        if not self._swap(data):
            raise LeaseLost(f"{self.store.url}/{DOOMS_KEY} was changed by another collection; nothing more is deleted")
        self.dooms, self._seen = rows, data

    def _swap(self, data: bytes) -> bool:
        if self._seen is not None:
            return self.store.replace(DOOMS_KEY, data, self._seen)
        try:
            self.store.create(DOOMS_KEY, data)
        except ObjectExists:
            return False
        return True


def read_dooms(store: Store) -> dict[str, Doom]:
    """Dooms of the run at ``store`` by name."""
    return DoomList(store).dooms


def merges_made(store: Store, merged: Iterable[str]) -> set[str]:
    """Names of merges that need not be made: ``merged``, which are there, and those that retention took away."""
    return {*merged, *(name.removeprefix("merged/") for name in read_dooms(store) if name.startswith("merged/"))}


def names_going(store: Store) -> set[str]:
    """Folders of the run at ``store`` that are being taken away now, or were when a collection stopped."""
    return {name for name, doom in read_dooms(store).items() if doom.collected_at is None}


def without_gone(store: Store, items: Iterable[Listed]) -> list[Listed]:
    """Those of ``items`` that retention has not taken away: a listing that was kept, or an emptied folder, may name others."""
    dooms = read_dooms(store)

    def is_gone(item: Listed) -> bool:
        name = _folder_of(item)
        doom = dooms.get(name)
        if doom is None or not doom.is_of(commit_of(item)):
            return False
        return doom.collected_at is not None or not store.exists(f"{name}/{MANIFEST_KEY}")

    return [item for item in items if not is_gone(item)]


def without_doomed(store: Store, items: Iterable[Listed]) -> list[Listed]:
    """Those of ``items`` that retention neither took away nor is taking away."""
    dooms = read_dooms(store)

    def is_doomed(item: Listed) -> bool:
        doom = dooms.get(_folder_of(item))
        return doom is not None and (doom.collected_at is None or doom.is_of(commit_of(item)))

    return [item for item in items if not is_doomed(item)]


def commit_of(item: object) -> Commit | None:
    """The manifest, or the glance at it, of a checkpoint; None if only its URL is known."""
    known: Any = item if hasattr(item, "created") else getattr(item, "manifest", None)
    return cast("Commit | None", known)


def when(seconds: float) -> str:
    """A moment for people."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def _folder_of(item: HasUrl) -> str:
    return "/".join(item.url.rsplit("/", 2)[1:])


def _encode(dooms: dict[str, Doom]) -> bytes:
    rows = [dataclasses.asdict(doom) for _, doom in sorted(dooms.items())]
    return json.dumps({"format_version": FORMAT_VERSION, "dooms": rows}, sort_keys=True).encode()


def _parse(data: bytes, where: str) -> dict[str, Doom]:
    try:
        values = json.loads(data)
        if values["format_version"] != FORMAT_VERSION:
            raise TypeError(f"format_version {values['format_version']!r}; this version reads {FORMAT_VERSION}")
        dooms = [parse_record(Doom, row) for row in values["dooms"]]
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{where} is damaged ({error}); what retention took away is not known") from error
    return {doom.name: doom for doom in dooms}
