"""Publish the gang's state as a snapshot: every rank writes its share, rank 0 commits the manifest."""

from __future__ import annotations

import json
import math
import time
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from cluster.storage import Store
from tasks.checkpoints.groups import group_names
from tasks.checkpoints.manifest import (
    STATE_KEY,
    LossStatistics,
    Manifest,
    Shard,
    model_digest,
    state_digest,
)
from tasks.checkpoints.run_folder import code_version, snapshot_key
from tasks.checkpoints.writer import commit_manifest, write_side_files
from tasks.models.build import build_model_config
from tasks.training.rank_state import gather_share
from tasks.training.schedule import phase_at, step_learning_rate
from tasks.training.share import write_share

if TYPE_CHECKING:
    from tasks.training.worker import Worker


class LossWindow:
    """Loss and gradient norm of the steps since the previous snapshot."""

    def __init__(self) -> None:
        self._losses: list[float] = []
        self._norms: list[float] = []
        self._nonfinite = 0

    def add(self, loss: float, gradient_norm: float) -> None:
        """Count one step."""
        if math.isfinite(loss) and math.isfinite(gradient_norm):
            self._losses.append(loss)
            self._norms.append(gradient_norm)
        else:
            self._nonfinite += 1

    def statistics(self) -> LossStatistics:
        """Summary for the manifest."""
        count = len(self._losses)
        return LossStatistics(
            mean=sum(self._losses) / count if count else None,
            maximum=max(self._losses, default=None),
            last=self._losses[-1] if count else None,
            gradient_norm_mean=sum(self._norms) / count if count else None,
            steps=count + self._nonfinite,
            nonfinite_steps=self._nonfinite,
        )


def publish_snapshot(worker: Worker, window: LossWindow, segment: int) -> float:
    """Collectively write and commit the snapshot of the step just completed; returns seconds taken.

    The manifest appears only after every rank reported its shards; a rank that fails leaves none.
    """
    started = time.perf_counter()
    store = worker.run.store.child(snapshot_key(worker.step))
    mine = write_share(gather_share(worker.model, worker.rank, worker.world_size), store)
    everyone: list[list[Shard]] | None = [[] for _ in range(worker.world_size)] if worker.rank == 0 else None
    dist.gather_object(mine, everyone, dst=0)
    if everyone is not None:
        shards = tuple(shard for rank_shards in everyone for shard in rank_shards)
        _commit(worker, store, shards, window.statistics(), segment)
    dist.barrier()
    return time.perf_counter() - started


def state_scalars(worker: Worker) -> dict[str, Any]:
    """The scalar training state; holds no wall-clock value, so that equal states are equal bytes."""
    config = worker.config
    return {
        "format_version": 1,
        "step": worker.step,
        "tokens_seen": worker.tokens_seen,
        "schedule": {
            "phase": phase_at(config, worker.tokens_seen),
            "learning_rate": step_learning_rate(config, worker.step),
            "total_tokens": config.training.total_tokens,
        },
        "data_position": {
            "sequences_seen": worker.step * config.training.batch_sequences,
            "order_seed": config.seed,
            "corpus_digest": worker.corpus.digest,
        },
        "rng": {"rule": "seeded per step from (seed, step, rank)", "seed": config.seed, "step": worker.step},
        "optimizer": {"name": "adamw", "steps": worker.step},
    }


def _commit(worker: Worker, store: Store, shards: tuple[Shard, ...], loss: LossStatistics, segment: int) -> None:
    scalars = state_scalars(worker)
    manifest = Manifest(
        kind="training",
        step=worker.step,
        tokens_seen=worker.tokens_seen,
        digest=model_digest(shards),
        state_digest=state_digest(shards, scalars),
        shards=shards,
        files=write_side_files(store, _small_files(worker, scalars), shards, worker.check_lease),
        parameter_groups=group_names(sorted(t.name for s in shards if s.part == "model" for t in s.tensors)),
        phase=phase_at(worker.config, worker.tokens_seen),
        learning_rate=step_learning_rate(worker.config, worker.step),
        loss=loss,
        healthy=loss.healthy,
        run_id=worker.identity.run_id,
        segment=segment,
        code_version=code_version(),
        created=time.time(),
    )
    commit_manifest(store, manifest, worker.check_lease)


def _small_files(worker: Worker, scalars: dict[str, Any]) -> dict[str, bytes]:
    model_config = build_model_config(worker.config.model, worker.config.training.sequence_length)
    return {
        "config.json": model_config.to_json_string(use_diff=False).encode(),
        STATE_KEY: json.dumps(scalars, indent=1).encode(),
    }
