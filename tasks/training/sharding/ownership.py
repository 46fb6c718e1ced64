"""Which rank writes which tensor of a snapshot: a pure function of shapes and mesh, the same on every rank.

A tensor on disk that lies whole on a rank stays there: experts, always, since parameters are cut between experts. The
others are spread over all ranks so that each writes about as many bytes.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from tasks.models.disk_layout import Piece, pieces_of
from tasks.training.sharding.mesh import MeshPlan

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A parameter as ownership sees it."""

    name: str
    """Layout name."""
    shape: tuple[int, ...]
    """Shape of the whole parameter."""
    is_expert: bool
    """Whether it is cut over the expert-parallel group."""


@dataclass(frozen=True, kw_only=True)
class Owned:
    """One tensor on disk and the rank that writes it."""

    index: int
    """Which parameter it is part of, counted in the network's order."""
    piece: Piece
    """Which part."""
    owner: int
    """The rank that writes it."""
    is_whole: bool
    """Whether the owner holds all its rows already."""

    @property
    def num_elements(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.piece.shape)


@functools.lru_cache(maxsize=4)
def plan_ownership(parameters: tuple[Parameter, ...], plan: MeshPlan) -> tuple[Owned, ...]:
    """Give every disk tensor of ``parameters`` an owner: those that lie whole first, then the largest first."""
    loads = [0] * plan.world_size
    owned: list[Owned] = []
    scattered: list[tuple[int, Piece]] = []
    for index, parameter in enumerate(parameters):
        for piece in pieces_of(parameter.name, parameter.shape):
            holder = _holder(parameter, piece, plan)
            if holder is None:
                scattered.append((index, piece))
                continue
            candidates = range(holder, plan.world_size, plan.shards)
            owned.append(_assign(index, piece, min(candidates, key=loads.__getitem__), is_whole=True))
            loads[owned[-1].owner] += owned[-1].num_elements
    for index, piece in sorted(scattered, key=lambda item: -math.prod(item[1].shape)):
        owned.append(_assign(index, piece, loads.index(min(loads)), is_whole=False))
        loads[owned[-1].owner] += owned[-1].num_elements
    return tuple(owned)


def plan_rounds(items: Iterable[tuple[int, int, Item]], limit_bytes: int) -> Iterator[list[Item]]:
    """Cut (owner, bytes, item) into rounds in which no owner receives more than ``limit_bytes``, or one item if that is larger."""
    queues: dict[int, deque[tuple[int, Item]]] = {}
    for owner, num_bytes, item in items:
        queues.setdefault(owner, deque()).append((num_bytes, item))
    while any(queues.values()):
        taken: list[Item] = []
        for owner in sorted(queues):
            queue, room = queues[owner], limit_bytes
            while queue and (queue[0][0] <= room or room == limit_bytes):
                num_bytes, item = queue.popleft()
                taken.append(item)
                room -= num_bytes
        yield taken


def _assign(index: int, piece: Piece, owner: int, *, is_whole: bool) -> Owned:
    return Owned(index=index, piece=piece, owner=owner, is_whole=is_whole)


def _holder(parameter: Parameter, piece: Piece, plan: MeshPlan) -> int | None:
    """Shard that holds all rows of ``piece``, if one does."""
    rows = parameter.shape[0]
    if piece.expert is None:
        return 0 if plan.rows(rows, 0, is_expert=parameter.is_expert) == (0, rows) else None
    return _holders_of_rows(rows, parameter.is_expert, plan)[piece.expert]


@functools.lru_cache(maxsize=64)
def _holders_of_rows(num_rows: int, is_expert: bool, plan: MeshPlan) -> list[int]:
    holders = [0] * num_rows
    for shard in range(plan.shards):
        start, end = plan.rows(num_rows, shard, is_expert=is_expert)
        holders[start:end] = [shard] * (end - start)
    return holders
