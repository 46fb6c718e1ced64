"""A gang of plain processes that trains tiny models, case after case, and leaves what each rank computed in files.

One launch runs many cases, since importing torch and transformers costs a rank more than training does.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from cluster.storage import open_store
from configs.load import load_config
from configs.schema import Config
from tasks.checkpoints.manifest import LossStatistics, Shard
from tasks.checkpoints.reader import open_checkpoint
from tasks.models.build import build_model_config
from tasks.models.disk_layout import model_buffers
from tasks.training.sharding.rank_state import gather_share, restore_rank
from tasks.training.sharding.sharded_model import ShardedModel, build_sharded_model
from tasks.training.snapshots.facts import SnapshotFacts, commit_snapshot
from tasks.training.snapshots.share import share_objects, write_object
from tests.gloo_ranks import end_ranks, gloo_rank, start_ranks

SEQUENCES, LENGTH = 8, 16
LEARNING_RATE = 1e-3
MAX_NORM = 0.5
"""Below the gradient norms of all cases, so that clipping takes part."""
FAMILIES: dict[str, tuple[str, ...]] = {
    "qwen3_moe": (),
    "olmoe": ("model.num_key_value_heads=4",),
    "mixtral": (),
    "deepseek_v3": (
        "model.num_key_value_heads=4", "model.key_value_rank=16", "model.query_rank=24", "model.rope_head_size=4",
        "model.value_head_size=8", "model.num_shared_experts=1", "model.num_dense_layers=1",
        "model.num_expert_groups=2", "model.num_groups_per_token=1",
    ),
    "llama": ("model.num_experts=0",),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model that a gang builds, perhaps restores, and trains."""

    name: str
    """Results are written under this name."""
    family: str
    """Key of :data:`FAMILIES`."""
    overrides: Sequence[str] = ()
    """Of the configuration, on top of the family's."""
    steps: tuple[int, int] = (0, 2)
    """First step and step after the last."""
    restore: str | None = None
    """Snapshot to begin with."""
    snapshots: dict[str, str] | None = None
    """Where to publish the state after how many steps (as text: keys of JSON)."""


def case_config(case: Case, world_size: int) -> Config:
    """Two layers, hidden 32, 4 experts, batches of 8 sequences of 16 tokens."""
    tokens = SEQUENCES * LENGTH
    return load_config(
        "tiny",
        (
            "model.hidden_size=32", "model.head_size=8", "model.intermediate_size=48", "model.num_experts=4",
            "model.expert_intermediate_size=24", f"training.sequence_length={LENGTH}", f"training.batch_tokens={tokens}",
            f"training.num_workers={world_size}", f"training.total_tokens={64 * tokens}",
            f"snapshots.interval_tokens={tokens}", f"anneal.tokens={tokens}", "schedule.warmup_tokens=0",
            f"evaluation.slice_tokens={LENGTH}", "optimizer.epsilon=1e-6", f"model.family={case.family}",
            *FAMILIES[case.family], *case.overrides,
        ),
    ).config  # fmt: skip


def batch_of(step: int) -> torch.Tensor:
    """The global batch of ``step``, int64 ``[SEQUENCES, LENGTH + 1]``."""
    return torch.from_numpy(np.random.default_rng(step).integers(0, 256, (SEQUENCES, LENGTH + 1)))


def loss_of(network: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of ``tokens``."""
    logits = network(input_ids=tokens[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


def run_gang(cases: Sequence[Case], world_size: int, folder: Path) -> None:
    """Run ``cases`` on ``world_size`` ranks; each rank leaves ``<folder>/<case>-<rank>.npz``."""
    folder.mkdir(parents=True, exist_ok=True)
    plan = json.dumps([asdict(case) for case in cases])
    end_ranks(start_ranks(["-m", "tests.sharded_gang"], world_size, folder, str(folder), plan))


def _run_case(case: Case, rank: int, world_size: int) -> dict[str, np.ndarray]:
    config = case_config(case, world_size)
    model = build_sharded_model(config, rank, world_size)
    if case.restore is not None:
        restore_rank(model, open_checkpoint(case.restore), with_moments=True, optimizer_steps=case.steps[0])
    losses, norms, found = [], [], {}
    for step in range(*case.steps):
        share = SEQUENCES // world_size
        mine = batch_of(step)[rank * share : (rank + 1) * share]
        total = torch.zeros(())
        for part in model.micro_batches(mine, config.training.micro_batches):
            loss = loss_of(model.network, part) / config.training.micro_batches
            loss.backward()
            total += loss.detach()
        dist.all_reduce(total)
        losses.append(float(total) / world_size)
        norm = model.gradient_norm()
        norms.append(float(norm))
        if step == case.steps[0]:
            found |= _rows(model, "gradient")
        model.clip_gradients(MAX_NORM, norm)
        model.step(LEARNING_RATE)
        # As a router bias moves: outside the optimizer, alike on every rank.
        for bias in model_buffers(model.network).values():
            bias.add_(0.01 * (step + 1) * torch.arange(len(bias)))
        if url := (case.snapshots or {}).get(str(step + 1)):
            _publish(model, config, url, step + 1, rank, world_size)
    return found | _rows(model, "weight") | {"loss": np.array(losses), "norm": np.array(norms)}


def _rows(model: ShardedModel, kind: str) -> dict[str, np.ndarray]:
    """This rank's rows by ``kind/first row/layout name``."""
    values: dict[str, Any] = {}
    for item in model.slices:
        gradient = item.parameter.grad
        tensor = item.local.detach() if kind == "weight" else gradient.to_local()  # type: ignore[union-attr]
        values[f"{kind}/{item.row_start}/{item.name}"] = tensor.numpy().copy()
    return values


def _publish(model: ShardedModel, config: Config, url: str, step: int, rank: int, world_size: int) -> None:
    store = open_store(url)
    mine = [write_object(item, store) for item in share_objects(gather_share(model, rank, world_size))]
    everyone: list[list[Shard]] | None = [[] for _ in range(world_size)] if rank == 0 else None
    dist.gather_object(mine, everyone, dst=0)
    if everyone is not None:
        text = build_model_config(config.model, config.training.sequence_length).to_json_string(use_diff=False)
        facts = SnapshotFacts(
            key="", step=step, tokens_seen=step * config.training.batch_tokens, phase="stable",
            learning_rate=LEARNING_RATE, scalars={"step": step}, files={"config.json": text.encode()},
            run_id="test", segment=1,
            loss=LossStatistics(
                mean=None, maximum=None, last=None, gradient_norm_mean=None, steps=step, nonfinite_steps=0
            ),
        )  # fmt: skip
        commit_snapshot(store, facts, tuple(shard for shards in everyone for shard in shards), lambda: None)
    dist.barrier()


def main() -> None:
    """One rank: after what :func:`tests.gloo_ranks.start_ranks` says, where results go, and the cases."""
    folder = Path(sys.argv[4])
    with gloo_rank() as (rank, world_size):
        for case in (Case(**fields) for fields in json.loads(sys.argv[5])):
            np.savez(folder / f"{case.name}-{rank}.npz", **_run_case(case, rank, world_size))


if __name__ == "__main__":
    main()
