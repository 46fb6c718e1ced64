"""A run whose snapshots hold real networks with random weights: what evaluations need, in a second, without training."""

from __future__ import annotations

from typing import Any

import torch

from cluster.storage import Store
from configs.schema import Config
from tasks.checkpoints.groups import group_names
from tasks.checkpoints.manifest import Manifest, model_digest
from tasks.checkpoints.run_folder import RunFolder, snapshot_key
from tasks.checkpoints.safetensors_header import TensorEntry
from tasks.checkpoints.writer import commit_manifest, write_shard, write_side_files
from tasks.models.build import build_model, build_model_config
from tasks.models.disk_layout import model_tensors, pieces_of
from tests.short_run import small


def network_config(*overrides: str) -> Config:
    """``tests.short_run.small`` with two short slices."""
    return small("evaluation.slice_tokens=256", "evaluation.num_slices=2", *overrides)


def begin_network_run(url: str, steps: int, config: Config | None = None) -> RunFolder:
    """A run with snapshots at steps 10, 20, ..., whose weights are drawn from their step."""
    run, config = RunFolder(url), config or network_config()
    run.begin(config)
    for step in range(10, 10 * steps + 1, 10):
        commit_network(run.store.child(snapshot_key(step)), config, seed=step, step=step)
    return run


def disk_tensors(config: Config, seed: int) -> dict[str, torch.Tensor]:
    """Weights drawn from ``seed`` by their names on disk."""
    network = build_model(config.model, config.training.sequence_length, seed=seed)
    return {
        piece.disk_name: piece.of(tensor.detach())
        for name, tensor in model_tensors(network).items()
        for piece in pieces_of(name, tensor.shape)
    }


def commit_network(store: Store, config: Config, *, seed: int, step: int, **fields: Any) -> Manifest:
    """A snapshot of a network with weights drawn from ``seed``, in one shard."""
    tensors = disk_tensors(config, seed)

    def chunks_of(entry: TensorEntry) -> list[bytes]:
        return [tensors[entry.name].numpy().tobytes()]

    specs = [(name, "F32", tuple(tensor.shape)) for name, tensor in sorted(tensors.items())]
    shard = write_shard(store, "model-00001-of-00001.safetensors", specs, chunks_of, "model")
    shape = build_model_config(config.model, config.training.sequence_length)
    small_files = {"config.json": str(shape.to_json_string(use_diff=False)).encode()}
    files = write_side_files(store, small_files, [shard], lambda: None)
    values: dict[str, Any] = {
        "kind": "training", "step": step, "tokens_seen": step * 128, "digest": model_digest((shard,)),
        "state_digest": None, "shards": (shard,), "files": files, "phase": "stable",
        "parameter_groups": group_names(sorted(tensors)), "run_id": "r",
    }  # fmt: skip
    return commit_manifest(store, Manifest(**{**values, **fields}), lambda: None)


def damage(store: Store, key: str, at: int = -1) -> None:
    """Flip a bit of an object, as a bad disk does."""
    data = bytearray(store.read(key))
    data[at] ^= 1
    store.put(key, bytes(data))
