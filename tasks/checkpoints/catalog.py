"""A run at a glance: what lists, schedules and status need of each manifest, without reading every manifest again.

Manifests never change once committed, so what was read of one is kept in an object of the run, ``cache/catalog.json``.
It is a cache: whoever finds it missing, damaged or behind reads the manifests and writes it anew, and nothing is merged,
restored or deleted on its word alone.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cluster.errors import ObjectMissing, StorageError
from cluster.fan_out import fan_out_local
from cluster.storage import Store
from configs.typed import parse_record
from tasks.checkpoints.digest import fingerprint
from tasks.checkpoints.manifest import MANIFEST_KEY, Manifest, parse_manifest
from tasks.checkpoints.recoveries import Recovery, living, read_recoveries

CATALOG_KEY = "cache/catalog.json"
FORMAT_VERSION = 1
NUM_READERS = 8
"""Manifests read at once."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Glance:
    """What a list says of one checkpoint."""

    url: str
    """Folder."""
    kind: str
    """``training``, ``merged`` or ``adopted``."""
    step: int | None
    """Completed optimizer steps."""
    tokens_seen: int | None
    """Tokens seen up to ``step``."""
    digest: str
    """Content digest of the model part."""
    healthy: bool
    """Whether every step since the snapshot before was finite."""
    phase: str | None
    """Phase of the learning-rate schedule."""
    bytes: int
    """Of all its objects; those of an adopted one lie elsewhere."""
    created: float
    """Unix seconds."""
    recovery: int = 0
    """Recoveries that were in force when it was made."""
    ephemeral: bool = False
    """Whether it is there to resume from alone."""
    method: str | None = None
    """For merged checkpoints."""
    inputs: tuple[str, ...] = ()
    """URLs of what was merged, oldest first."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """What a run held when somebody looked."""

    rows: Mapping[str, Glance]
    """Committed snapshots and merges by folder below the run."""
    recoveries: tuple[Recovery, ...]
    """Oldest first."""

    def snapshots(self) -> list[Glance]:
        """Snapshots by step, without those that a recovery left behind."""
        return living(self._all_snapshots(), self.recoveries)

    def left_behind(self) -> list[Glance]:
        """Snapshots by step that a recovery left behind."""
        kept = {glance.url for glance in self.snapshots()}
        return [glance for glance in self._all_snapshots() if glance.url not in kept]

    def merged(self) -> dict[str, Glance]:
        """Merged checkpoints by name, without those that a recovery left behind."""
        return {name: glance for name, glance in self.all_merged().items() if living([glance], self.recoveries)}

    def left_behind_merges(self) -> dict[str, Glance]:
        """Merged checkpoints by name that end on a way which a recovery left behind."""
        kept = self.merged()
        return {name: glance for name, glance in self.all_merged().items() if name not in kept}

    def all_merged(self) -> dict[str, Glance]:
        """Merged checkpoints by name, those that a recovery left behind included."""
        rows = sorted(self.rows.items())
        return {f.removeprefix("merged/"): glance for f, glance in rows if f.startswith("merged/")}

    def _all_snapshots(self) -> list[Glance]:
        found = [glance for folder, glance in self.rows.items() if folder.startswith("snapshots/")]
        return sorted((g for g in found if g.step is not None), key=lambda glance: (glance.step or 0, glance.recovery))


class Catalog:
    """What was read of the manifests of the run at ``store``; threads may share one."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._lock = threading.Lock()
        self._rows: dict[str, tuple[str, Glance]] = {}
        """Folder below the run to the manifest's version and what it says."""
        self._losses: dict[str, float | None] = {}
        self._is_read = False

    def look(self) -> Look:
        """What is committed now; three listings, and one read per new manifest and per recovery."""
        with self._lock:
            self._require_cache()
            folders = [f"{part}/{name}" for part in ("snapshots", "merged") for name in self.store.folders(part)]
            known = {
                folder: self._rows[folder] for folder in folders if folder in self._rows and self._is_current(folder)
            }
            new = fan_out_local(self._read, [f for f in folders if f not in known], num_workers=NUM_READERS)
            rows = known | {folder: row for folder, row in new if row is not None}
            # After the snapshots: one that was committed in between belongs to a recovery that is then read, too.
            recoveries = read_recoveries(self.store)
            if rows != self._rows:
                self._rows = rows
                self._write_cache()
            return Look(rows={folder: glance for folder, (_, glance) in rows.items()}, recoveries=tuple(recoveries))

    def losses(self, read: Callable[[str], float | None]) -> dict[str, float | None]:
        """Held-out loss of every evaluation record of the run, by key; ``read`` is asked for those that are new.

        None stands for a loss that is not finite: neither JSON nor a fingerprint has a number for it.
        """
        with self._lock:
            self._require_cache()
            keys = self.store.keys("evaluations")
            new = [key for key in keys if key not in self._losses]
            found = {key: loss for key, loss in self._losses.items() if key in set(keys)}
            found |= dict(fan_out_local(lambda key: (key, _finite(read(key))), new, num_workers=NUM_READERS))
            if found != self._losses:
                self._losses = found
                self._write_cache()
            return found

    def _is_current(self, folder: str) -> bool:
        """Whether the manifest that was read is the one that is there; over a network, whether its folder is."""
        return self.store.reads_ahead or self._version(folder) == self._rows[folder][0]

    def _version(self, folder: str) -> str:
        if self.store.reads_ahead:
            return ""
        try:
            return self.store.version(f"{folder}/{MANIFEST_KEY}")
        except ObjectMissing:
            return "gone"

    def _read(self, folder: str) -> tuple[str, tuple[str, Glance] | None]:
        key = f"{folder}/{MANIFEST_KEY}"
        version = self._version(folder)
        try:
            data = self.store.read(key)
        except ObjectMissing:
            return folder, None
        manifest = parse_manifest(data, f"{self.store.url}/{key}")
        return folder, (version, glance_at(manifest, f"{self.store.url}/{folder}"))

    def _require_cache(self) -> None:
        if self._is_read:
            return
        self._is_read = True
        data = self.store.read_if_present(CATALOG_KEY)
        if data is None:
            return
        try:
            values = json.loads(data)
            if values["format_version"] == FORMAT_VERSION and values["fingerprint"] == fingerprint(values["content"]):
                content = values["content"]
                self._rows = {
                    folder: (version, parse_record(Glance, {**glance, "url": f"{self.store.url}/{folder}"}))
                    for folder, (version, glance) in content["rows"].items()
                }
                self._losses = {
                    str(key): None if loss is None else float(loss) for key, loss in content["losses"].items()
                }
        except (ValueError, KeyError, TypeError, AttributeError):
            self._rows, self._losses = {}, {}

    def _write_cache(self) -> None:
        rows = {folder: [version, _without_url(glance)] for folder, (version, glance) in sorted(self._rows.items())}
        content = {"rows": rows, "losses": self._losses}
        values = {"format_version": FORMAT_VERSION, "fingerprint": fingerprint(content), "content": content}
        try:
            self.store.put(CATALOG_KEY, json.dumps(values).encode())
        except StorageError as error:
            # A bucket that may only be read can be looked at; it takes longer without the cache.
            logger.info("the catalog of %s was not kept: %s", self.store.url, error)


def glance_at(manifest: Manifest, url: str) -> Glance:
    """What a list says of the checkpoint with ``manifest`` at ``url``."""
    return Glance(
        url=url,
        kind=manifest.kind,
        step=manifest.step,
        tokens_seen=manifest.tokens_seen,
        digest=manifest.digest,
        healthy=manifest.healthy,
        phase=manifest.phase,
        bytes=sum(shard.bytes for shard in manifest.shards) + sum(file.bytes for file in manifest.files),
        created=manifest.created,
        recovery=manifest.recovery,
        ephemeral=manifest.ephemeral,
        method=manifest.merge.method if manifest.merge else None,
        inputs=tuple(item.url for item in manifest.merge.inputs) if manifest.merge else (),
    )


def _finite(loss: float | None) -> float | None:
    return loss if loss is not None and math.isfinite(loss) else None


def _without_url(glance: Glance) -> dict[str, Any]:
    values = dataclasses.asdict(glance)
    del values["url"]
    return values
