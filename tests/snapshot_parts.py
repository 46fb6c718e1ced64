"""What ranks of a made-up gang write of a snapshot: small, other values at every step, the same in every process."""

from __future__ import annotations

from typing import Any

import torch

from cluster.storage import Store, open_store
from tasks.checkpoints.manifest import LossStatistics
from tasks.checkpoints.run_folder import snapshot_key
from tasks.training.share import HostShare, write_share
from tasks.training.snapshot_facts import SnapshotFacts, commit_snapshot

WORLD_SIZE = 2


def share_of(rank: int, step: int, world_size: int = WORLD_SIZE) -> HostShare:
    """Two layers' weights and moments, other values at every step and rank."""
    draws = torch.Generator().manual_seed(1000 * step + rank)
    model = {f"model.layers.{rank}.{n}.weight": torch.randn(8, 16, generator=draws) for n in ("a", "b")}
    state = {
        f"{moment}.{name}": torch.rand(8, 16, generator=draws) for moment in ("exp_avg", "exp_avg_sq") for name in model
    }
    return HostShare(number=rank + 1, of=world_size, model=model, state=state)


def facts_at(step: int, **fields: Any) -> SnapshotFacts:
    loss = LossStatistics(mean=2.5, maximum=3.0, last=2.0, gradient_norm_mean=1.0, steps=4, nonfinite_steps=0)
    return SnapshotFacts(
        **{
            "key": snapshot_key(step), "step": step, "tokens_seen": step * 100, "phase": "stable", "learning_rate": 1e-3,
            "loss": loss, "scalars": {"step": step}, "files": {"config.json": b"{}"}, "run_id": "r", "segment": 1,
            "created": 1.8e9, **fields,
        }
    )  # fmt: skip


def lease_in_force() -> None:
    return None


def written_synchronously(url: str, step: int) -> Store:
    """The same snapshot without any of what is tested here."""
    store = open_store(url).child(snapshot_key(step))
    shards = tuple(shard for rank in range(WORLD_SIZE) for shard in write_share(share_of(rank, step), store))
    commit_snapshot(store, facts_at(step), shards, lease_in_force)
    return store
