"""A run at a glance: what lists, schedules and status need of each manifest, without reading every manifest again.

Manifests never change once committed, so what was read of one is kept in an object of the run, ``cache/catalog.json``.
It is a cache: whoever finds it missing, damaged or behind reads the manifests and writes it anew, and nothing is merged,
restored or deleted on its word alone.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from cluster.errors import ObjectMissing
from cluster.fan_out import fan_out_local
from cluster.storage import Store
from configs.typed import parse_record
from tasks.checkpoints.digest import fingerprint
from tasks.checkpoints.manifest import MANIFEST_KEY, Manifest, parse_manifest

CATALOG_KEY = "cache/catalog.json"
FORMAT_VERSION = 1
NUM_READERS = 8
"""Manifests read at once."""


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
    method: str | None = None
    """For merged checkpoints."""
    inputs: tuple[str, ...] = ()
    """URLs of what was merged, oldest first."""


class Catalog:
    """Committed snapshots and merges of the run at ``store``."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._rows: dict[str, tuple[str, Glance]] = {}
        """Folder below the run to the manifest's version and what it says."""
        self._is_read = False

    def refresh(self) -> None:
        """Look for what was committed or removed since; two listings, and one read per new manifest."""
        if not self._is_read:
            self._rows, self._is_read = self._read_cache(), True
        folders = [f"{part}/{name}" for part in ("snapshots", "merged") for name in self.store.folders(part)]
        known = {folder: self._rows[folder] for folder in folders if folder in self._rows and self._is_current(folder)}
        new = fan_out_local(self._look, [f for f in folders if f not in known], num_workers=NUM_READERS)
        rows = known | {folder: row for folder, row in new if row is not None}
        if rows != self._rows:
            self._rows = rows
            self._write_cache()

    def snapshots(self) -> list[Glance]:
        """Snapshots by step, as of the last :meth:`refresh`."""
        found = [glance for folder, (_, glance) in self._rows.items() if folder.startswith("snapshots/")]
        return sorted((glance for glance in found if glance.step is not None), key=lambda glance: glance.step or 0)

    def merged(self) -> dict[str, Glance]:
        """Merged checkpoints by name, as of the last :meth:`refresh`."""
        rows = {folder: glance for folder, (_, glance) in sorted(self._rows.items())}
        return {f.removeprefix("merged/"): glance for f, glance in rows.items() if f.startswith("merged/")}

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

    def _look(self, folder: str) -> tuple[str, tuple[str, Glance] | None]:
        key = f"{folder}/{MANIFEST_KEY}"
        version = self._version(folder)
        try:
            data = self.store.read(key)
        except ObjectMissing:
            return folder, None
        manifest = parse_manifest(data, f"{self.store.url}/{key}")
        return folder, (version, glance_at(manifest, f"{self.store.url}/{folder}"))

    def _read_cache(self) -> dict[str, tuple[str, Glance]]:
        data = self.store.read_if_present(CATALOG_KEY)
        if data is None:
            return {}
        try:
            values = json.loads(data)
            if values["format_version"] != FORMAT_VERSION or values["fingerprint"] != fingerprint(values["rows"]):
                return {}
            return {
                folder: (version, parse_record(Glance, {**glance, "url": f"{self.store.url}/{folder}"}))
                for folder, (version, glance) in values["rows"].items()
            }
        except (ValueError, KeyError, TypeError, AttributeError):
            return {}

    def _write_cache(self) -> None:
        rows = {folder: [version, _without_url(glance)] for folder, (version, glance) in sorted(self._rows.items())}
        values = {"format_version": FORMAT_VERSION, "fingerprint": fingerprint(rows), "rows": rows}
        self.store.put(CATALOG_KEY, json.dumps(values).encode())


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
        method=manifest.merge.method if manifest.merge else None,
        inputs=tuple(item.url for item in manifest.merge.inputs) if manifest.merge else (),
    )


def _without_url(glance: Glance) -> dict[str, Any]:
    values = dataclasses.asdict(glance)
    del values["url"]
    return values
