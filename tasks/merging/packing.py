"""Pack tensors into output shards: whole parameter groups, balanced by bytes."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

from tasks.checkpoints.groups import group_names


def pack_groups(sizes: Mapping[str, int], *, shard_bytes: int, min_bins: int) -> list[list[str]]:
    """Pack tensors of ``sizes`` bytes into shards: whole parameter groups, largest first, to the least-loaded shard.

    Groups above ``shard_bytes`` are cut between tensors. The number of shards is the smallest that keeps
    each under ``shard_bytes`` (a single larger tensor excepted), and at least ``min_bins`` where there
    are enough groups. Tensors keep the order of ``sizes`` inside a shard.
    """
    units = [unit for names in group_names(sizes).values() for unit in _cut(names, sizes, shard_bytes)]
    loads = [sum(sizes[name] for name in unit) for unit in units]
    num_bins = max(1, min(len(units), max(min_bins, -(-sum(loads) // shard_bytes))))
    position = {name: index for index, name in enumerate(sizes)}
    while True:
        bins = _fill(loads, units, num_bins)
        fits = all(load <= shard_bytes or len(indices) == 1 for load, indices in bins)
        if fits or num_bins >= len(units):
            return [sorted((n for i in indices for n in units[i]), key=position.__getitem__) for _, indices in bins]
        num_bins += max(1, num_bins // 50)


def _fill(loads: Sequence[int], units: Sequence[Sequence[str]], num_bins: int) -> list[tuple[int, list[int]]]:
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    heap = [(0, number) for number in range(num_bins)]
    for index in sorted(range(len(units)), key=lambda i: (-loads[i], units[i][0])):
        load, number = heap[0]
        bins[number].append(index)
        heapq.heapreplace(heap, (load + loads[index], number))
    totals = {number: load for load, number in heap}
    return [(totals[number], indices) for number, indices in enumerate(bins)]


def _cut(names: Sequence[str], sizes: Mapping[str, int], shard_bytes: int) -> list[list[str]]:
    units: list[list[str]] = []
    load = 0
    for name in names:
        size = sizes[name]
        if not units or load + size > shard_bytes:
            units.append([])
            load = 0
        units[-1].append(name)
        load += size
    return units
