"""A run as its URL shows it: identity, snapshots, merged checkpoints, segments, branches.

Neither a run's identity nor a committed manifest ever changes, so what was read of them is kept.
"""

from __future__ import annotations

import dataclasses
import json
import time
import uuid
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from cluster.errors import ObjectExists, ObjectMissing
from cluster.storage import open_store, require_create_if_absent
from configs.errors import UserError
from configs.load import config_from_dict, config_to_dict, identity_of
from configs.schema import Config
from tasks.checkpoints.catalog import Catalog, Glance, Look
from tasks.checkpoints.manifest import MANIFEST_KEY, Manifest, parse_manifest
from tasks.checkpoints.recoveries import Recovery, folder_suffix, living, read_recoveries
from tasks.checkpoints.start_point import StartPoint

RUN_KEY = "run.json"
RUN_LEASE = "run"


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """What ``run.json`` says."""

    run_id: str
    """Random, constant through resumes."""
    config: Config
    """As resolved when the run began."""
    start: StartPoint | None
    """Where it was forked from, or whose weights it began with; None for fresh weights."""
    code_version: str
    """pmaflow that began it."""
    created: float
    """Unix seconds."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A committed snapshot of a run."""

    step: int
    """Completed optimizer steps."""
    url: str
    """Folder."""
    manifest: Manifest
    """What it holds."""

    @property
    def digest(self) -> str:
        """Content digest of the model part."""
        return self.manifest.digest

    @property
    def tokens_seen(self) -> int | None:
        """Tokens seen up to ``step``."""
        return self.manifest.tokens_seen

    @property
    def healthy(self) -> bool:
        """Whether every step since the snapshot before was finite."""
        return self.manifest.healthy

    @property
    def phase(self) -> str | None:
        """Phase of the learning-rate schedule."""
        return self.manifest.phase

    @property
    def recovery(self) -> int:
        """Recoveries that were in force when it was made."""
        return self.manifest.recovery

    @property
    def ephemeral(self) -> bool:
        """Whether it is there to resume from alone, and in no window."""
        return self.manifest.ephemeral


class RunFolder:
    """Reads of one run URL; the only writes are identity and segments."""

    def __init__(self, url: str) -> None:
        self.store = open_store(url)
        self._manifests: dict[str, Manifest] = {}
        self._identity: RunIdentity | None = None
        self.catalog = Catalog(self.store)

    @property
    def url(self) -> str:
        """The run URL, as other tools can open it."""
        return self.store.url

    def identity(self) -> RunIdentity:
        """Identity of the run; :class:`configs.errors.UserError` if there is no run here."""
        if self._identity is not None:
            return self._identity
        data = self.store.read_if_present(RUN_KEY)
        if data is None:
            raise UserError(f"{self.url} holds no run (no {RUN_KEY}); check --run")
        values = json.loads(data)
        start = values["start"]
        self._identity = RunIdentity(
            run_id=values["run_id"],
            config=config_from_dict(values["config"]),
            start=StartPoint(**start) if start else None,
            code_version=values["code_version"],
            created=values["created"],
        )
        return self._identity

    def begin(self, config: Config, start: StartPoint | None = None) -> RunIdentity:
        """Create the run, or check that the run that is here has the same configuration and start.

        Raises :class:`configs.errors.UserError` with a field-by-field difference otherwise.
        """
        values = {
            "format_version": 1,
            "run_id": uuid.uuid4().hex,
            "name": config.name,
            "config": config_to_dict(config),
            "start": dataclasses.asdict(start) if start else None,
            "code_version": code_version(),
            "created": time.time(),
        }
        data = json.dumps(values, indent=1).encode()
        try:
            self.store.create(RUN_KEY, data)
        except ObjectExists:
            require_same_run(self.identity(), config, start, self.url)
        else:
            require_create_if_absent(self.store, RUN_KEY, data)
        return self.identity()

    def snapshots(self) -> list[Snapshot]:
        """Committed snapshots by step, without those that a recovery left behind."""
        # Snapshots first: one that is committed in between belongs to a recovery that is then read, too.
        found = self.all_snapshots()
        return living(found, self.recoveries())

    def look(self) -> Look:
        """Snapshots, merges and recoveries as lists need them, by the catalog: each manifest is read once in a run's life."""
        return self.catalog.look()

    def glances(self) -> list[Glance]:
        """Living snapshots by step, of a new look."""
        return self.look().snapshots()

    def recoveries(self) -> list[Recovery]:
        """Recoveries of the run, oldest first."""
        return read_recoveries(self.store)

    def all_snapshots(self) -> list[Snapshot]:
        """Committed snapshots by step, those that a recovery left behind included."""
        found = []
        for name in self.store.folders("snapshots"):
            manifest = self._manifest(f"snapshots/{name}")
            if manifest is not None and manifest.step is not None:
                found.append(Snapshot(step=manifest.step, url=f"{self.url}/snapshots/{name}", manifest=manifest))
        return sorted(found, key=lambda snapshot: (snapshot.step, snapshot.recovery))

    def trajectory(self) -> list[Snapshot]:
        """Snapshots of this run and, before the point where it was forked, of the run it came from; by step.

        A run that began with another's weights alone counts anew: it has no steps of that run.
        """
        start = self.identity().start
        own = self.snapshots()
        if start is None or start.weights_only or "/snapshots/" not in start.url:
            return own
        parent = RunFolder(start.url.rpartition("/snapshots/")[0])
        return [snapshot for snapshot in parent.trajectory() if snapshot.step <= start.step] + own

    def merged(self) -> dict[str, Manifest]:
        """Committed merged checkpoints by name, without those that end on a way which a recovery left behind."""
        # Merges first, as with snapshots.
        found = self.all_merged()
        recoveries = self.recoveries()
        return {name: manifest for name, manifest in found.items() if living([manifest], recoveries)}

    def all_merged(self) -> dict[str, Manifest]:
        """Committed merged checkpoints by name, those that a recovery left behind included."""
        names = self.store.folders("merged")
        manifests = {name: self._manifest(f"merged/{name}") for name in names}
        return {name: manifest for name, manifest in manifests.items() if manifest is not None}

    def branches(self) -> list[str]:
        """Names of the branches (runs forked from this one)."""
        return self.store.folders("branches")

    def branch(self, name: str) -> RunFolder:
        """The branch ``name`` as a run of its own."""
        return RunFolder(f"{self.url}/branches/{name}")

    def segments(self) -> list[dict[str, Any]]:
        """Segments of the run, oldest first."""
        keys = [key for key in self.store.keys("segments") if key.endswith(".json")]
        return [json.loads(self.store.read(key)) for key in keys]

    def newest_segment(self) -> dict[str, Any] | None:
        """The segment that began last; reads no other."""
        keys = [key for key in self.store.keys("segments") if key.endswith(".json")]
        return dict(json.loads(self.store.read(keys[-1]))) if keys else None

    def open_segment(self, *, cause: str, start: dict[str, Any], plan: dict[str, Any]) -> int:
        """Record the start of a segment and return its number, from 1; the one before it is closed if it was left open."""
        newest = self.newest_segment()
        if newest is not None and newest["end"] is None:
            self.close_segment(newest["segment"], reason="interrupted", step=start["step"])
        number = newest["segment"] + 1 if newest else 1
        record = {"segment": number, "cause": cause, "start": start, "plan": plan, "started": time.time(), "end": None}
        self.store.create(_segment_key(number), json.dumps(record, indent=1).encode())
        return number

    def close_segment(self, number: int, *, reason: str, step: int, alarm: dict[str, Any] | None = None) -> None:
        """Record why and where a segment ended; for reason ``spike`` with the alarm's fields."""
        key = _segment_key(number)
        record = json.loads(self.store.read(key))
        record["end"] = {"reason": reason, "step": step, "time": time.time()} | ({"alarm": alarm} if alarm else {})
        self.store.put(key, json.dumps(record, indent=1).encode())

    def _manifest(self, folder: str) -> Manifest | None:
        if folder not in self._manifests:
            try:
                data = self.store.read(f"{folder}/{MANIFEST_KEY}")
            except ObjectMissing:
                return None
            self._manifests[folder] = parse_manifest(data, f"{self.url}/{folder}/{MANIFEST_KEY}")
        return self._manifests[folder]


def snapshot_key(step: int, recovery: int = 0) -> str:
    """Folder of the snapshot at ``step`` below its run, made when ``recovery`` recoveries were in force."""
    return f"snapshots/step-{step:09d}{folder_suffix(recovery)}"


def code_version() -> str:
    """Version of the installed pmaflow."""
    try:
        return metadata.version("pmaflow")
    except metadata.PackageNotFoundError:
        return "0+source"


def _segment_key(number: int) -> str:
    return f"segments/{number:04d}.json"


def require_same_run(there: RunIdentity, config: Config, start: StartPoint | None, url: str) -> None:
    """Raise :class:`configs.errors.UserError` with every field in which ``config`` and ``start`` are not the run's at ``url``."""
    old, new = identity_of(there.config), identity_of(config)
    if there.start != start:
        old["start"], new["start"] = there.start, start
    lines = [
        f"  {key}: run has {old.get(key)!r}, asked for {new.get(key)!r}"
        for key in {**old, **new}
        if old.get(key) != new.get(key)
    ]
    if lines:
        raise UserError(
            f"{url} is a run of another configuration:\n"
            + "\n".join(lines)
            + "\nGive the same values, --fork NAME to branch a new run off this one, or another --run"
        )
