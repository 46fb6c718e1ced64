"""A made-up gang: what its ranks write of a snapshot, small and the same in every process, and ranks that are threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from cluster.storage import Store, open_store
from tasks.checkpoints.manifest import LossStatistics
from tasks.checkpoints.run_folder import snapshot_key
from tasks.training.snapshots.board import SnapshotBoard
from tasks.training.snapshots.facts import SnapshotFacts, commit_snapshot
from tasks.training.snapshots.flight import Terms
from tasks.training.snapshots.share import HostShare, share_objects, write_object
from tasks.training.snapshots.writer import SnapshotWriter
from tests.faulty_store import FaultyStore

WORLD_SIZE = 2
NO_PAUSE = (0.0,) * 7
PATIENCE_SECONDS = 60
"""Longer than any of this takes; what is waited for comes, or the test fails."""


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
    objects = [item for rank in range(WORLD_SIZE) for item in share_objects(share_of(rank, step))]
    shards = tuple(write_object(item, store) for item in objects)
    commit_snapshot(store, facts_at(step), shards, lease_in_force)
    return store


def healthy(method: str, key: str) -> bool:
    return False


def no_streams(method: str, _key: str) -> bool:
    return method == "create_stream"


class Gate:
    """A ``fail`` that makes one call stand still until it is opened, and never fails."""

    def __init__(self, method: str, ending: str) -> None:
        self.method, self.ending = method, ending
        self.is_reached, self.is_open = threading.Event(), threading.Event()

    def __call__(self, method: str, key: str) -> bool:
        if method == self.method and key.endswith(self.ending):
            self.is_reached.set()
            assert self.is_open.wait(PATIENCE_SECONDS)
        return False


class Gang:
    """Ranks that share a run folder and a board, each with a store and a writer of its own."""

    def __init__(
        self,
        url: str,
        *fails: Callable[[str, str], bool],
        pauses_seconds: tuple[float, ...] = NO_PAUSE,
        patience_seconds: float = PATIENCE_SECONDS,
        check_lease: Callable[[], None] = lease_in_force,
        boards: Sequence[Any] = (),
    ) -> None:
        boards = boards or [HashStore()] * len(fails)
        self.stores = [FaultyStore(open_store(url), fail) for fail in fails]
        self.writers = [
            SnapshotWriter(
                store,
                Terms(
                    board=SnapshotBoard(boards[rank], rank, len(fails)),
                    check_lease=check_lease,
                    pauses_seconds=pauses_seconds,
                    patience_seconds=patience_seconds,
                ),
            )
            for rank, store in enumerate(self.stores)
        ]

    def begin(self, step: int, **fields: Any) -> None:
        for rank, writer in enumerate(self.writers):
            writer.begin(share_of(rank, step, len(self.writers)), facts_at(step, **fields))

    def errors(self) -> list[Exception]:
        """What every rank raises at the end; a rank that raises nothing fails the test."""
        return [self.error_of(writer) for writer in self.writers]

    @staticmethod
    def error_of(writer: SnapshotWriter) -> Exception:
        with pytest.raises(Exception) as caught:
            writer.finish()
        return caught.value


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
