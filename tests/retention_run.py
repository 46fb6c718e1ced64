"""A small real run for tests of retention: snapshots a few bytes long, with manifests as training writes them."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from typing import Any

from cluster.errors import ObjectMissing
from cluster.storage import Store, open_store
from configs.load import config_to_dict
from configs.merging import MergeConfig, RetentionConfig
from configs.recovery import RecoveryConfig
from configs.schema import Config
from configs.sections import AnnealConfig, EvaluationConfig
from configs.training import ScheduleConfig, SnapshotConfig, TrainingConfig
from tasks.checkpoints.manifest import Manifest, model_digest, parse_manifest
from tasks.checkpoints.run_folder import RUN_KEY, snapshot_key
from tasks.checkpoints.writer import commit_manifest, write_shard, write_side_files

BATCH = 100
"""Tokens of a step."""
NOW = 1_800_000_000.0
HOUR = 3600.0
NO_RECOVERY = RecoveryConfig(policy="ignore")
"""What recoveries may need outweighs every other rule in a run as short as these: tests of it say so themselves."""


class Clock:
    """Time that a test moves."""

    def __init__(self, now: float = NOW) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def small_config(*, steps: int = 100, **sections: Any) -> Config:
    """A run of one snapshot a step, ``BATCH`` tokens each."""
    return Config(
        name="small",
        training=TrainingConfig(total_tokens=steps * BATCH, num_workers=1, sequence_length=BATCH, batch_tokens=BATCH),
        schedule=ScheduleConfig(warmup_tokens=0, decay_tokens=0),
        snapshots=SnapshotConfig(interval_tokens=BATCH),
        evaluation=EvaluationConfig(slice_tokens=BATCH),
        anneal=AnnealConfig(tokens=BATCH),
        **{
            "merge": MergeConfig(count=3),
            "retention": RetentionConfig(keep_last=1),
            "recovery": NO_RECOVERY,
            **sections,
        },
    )


def make_run(url: str, steps: Iterable[int], config: Config | None = None) -> Store:
    """A run at ``url`` with snapshots at ``steps``."""
    store = open_store(url)
    begin_run(store, config or small_config())
    for step in steps:
        commit(store, step)
    return store


def begin_run(store: Store, config: Config, start: dict[str, Any] | None = None) -> None:
    """The identity of a run."""
    values = {
        "format_version": 1, "run_id": "r", "name": config.name, "config": config_to_dict(config), "start": start,
        "code_version": "test", "created": NOW,
    }  # fmt: skip
    store.create(RUN_KEY, json.dumps(values).encode())


def commit(store: Store, step: int, *, state: bool = False, **fields: Any) -> Manifest:
    """A snapshot of two model shards (and one of state) whose weights are made of its step and recovery."""
    folder = store.child(snapshot_key(step, fields.get("recovery", 0)))
    specs = [("norm.weight", "F32", (4,)), ("head.weight", "F32", (2, 3))]
    shards = tuple(
        write_shard(
            folder,
            f"model-{number:05d}-of-00002.safetensors",
            [spec],
            lambda entry: [
                struct.pack(
                    f"<{entry.bytes // 4}f",
                    *(float(step + fields.get("recovery", 0) / 2 + i) for i in range(entry.bytes // 4)),
                )
            ],
            "model",
        )
        for number, spec in enumerate(specs, start=1)
    )
    if state:
        shards += (
            write_shard(folder, "state-00001-of-00001.safetensors", specs[:1], lambda e: [b"\0" * e.bytes], "state"),
        )
    files = write_side_files(folder, {"config.json": b'{"model_type": "small"}'}, shards, lambda: None)
    values: dict[str, Any] = {
        "kind": "training", "step": step, "tokens_seen": step * BATCH, "digest": model_digest(shards),
        "state_digest": None, "shards": shards, "files": files, "phase": "stable", "created": NOW + step,
        "parameter_groups": {"norms": ["norm.weight"], "head": ["head.weight"]}, "run_id": "r",
    }  # fmt: skip
    return commit_manifest(folder, Manifest(**{**values, **fields}), lambda: None)


def snapshot_url(store: Store, step: int) -> str:
    """URL of the snapshot at ``step``."""
    return f"{store.url}/{snapshot_key(step)}"


def visible(store: Store) -> list[str]:
    """Folders whose manifest is there."""
    return [key.removesuffix("/manifest.json") for key in store.keys("") if _is_manifest(key)]


def broken(store: Store) -> list[str]:
    """Objects that a visible manifest lists and that are not there whole: what must never be."""
    found = []
    for name in visible(store):
        data = store.read_if_present(f"{name}/manifest.json")
        if data is None:
            continue  # taken away since it was listed
        manifest = parse_manifest(data, name)
        for item in (*manifest.shards, *manifest.files):
            try:
                if store.size(f"{name}/{item.key}") != item.bytes:
                    found.append(f"{name}/{item.key}")
            except ObjectMissing:
                if store.exists(f"{name}/manifest.json"):
                    found.append(f"{name}/{item.key}")
    return found


def steps_left(store: Store) -> list[int]:
    """Steps of the snapshots whose manifest is there."""
    return [int(name.rsplit("-", 1)[1]) for name in visible(store) if name.startswith("snapshots/")]


def _is_manifest(key: str) -> bool:
    return key.endswith("/manifest.json") and key.startswith(("snapshots/", "merged/"))
