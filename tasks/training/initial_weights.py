"""Proof that the weights which a run begins with are those that it was begun for, by their bytes as they are now."""

from __future__ import annotations

import dataclasses

from tasks.checkpoints.content import digest_of_tensors, tensor_digests
from tasks.checkpoints.reader import Checkpoint
from tasks.checkpoints.start_point import StartPoint, require_digest
from tasks.training.rank_zero import told_by_all


def require_same_weights(checkpoint: Checkpoint, start: StartPoint, rank: int, world_size: int, key: str) -> None:
    """Raise :class:`tasks.checkpoints.start_point.WeightsReplaced`, on every rank, unless ``checkpoint`` is what ``start`` says.

    Collective: each rank hashes its share of the tensors, so that the checkpoint is read once. ``key`` is used once in the
    life of the gang.
    """
    by_size = sorted(checkpoint.model, key=lambda name: (-checkpoint.model[name].num_bytes, name))
    share = dataclasses.replace(checkpoint, model={name: checkpoint.model[name] for name in by_size[rank::world_size]})
    told = told_by_all(key, lambda: dict(tensor_digests(share)))
    digests = {name: digest for part in told for name, digest in part.items()}
    require_digest(start, digest_of_tensors(checkpoint, digests))
