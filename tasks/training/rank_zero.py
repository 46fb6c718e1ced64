"""What one rank finds out and all others need: told through the gang's key-value store, not in a collective.

Looking may take longer than ranks wait for each other in a collective: hundreds of manifests, a merge.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

POLL_SECONDS = 0.05
LONGEST_SECONDS = 2 * 3600.0
FAILED = "failed: "
Found = TypeVar("Found")


def told_by_rank_zero(key: str, find: Callable[[], Found]) -> Found:
    """What ``find`` gives on rank 0, on every rank; ``key`` is used once in the life of the process group.

    What travels is pickled between the processes of one gang, never stored. Raises ``RuntimeError`` where rank 0
    failed or is gone.
    """
    store = c10d.PrefixStore("told-by-rank-zero", c10d._get_default_store())
    if dist.get_rank() == 0:
        try:
            found = find()
        except BaseException as error:
            store.set(key, FAILED + str(error))
            raise
        store.set(key, pickle.dumps(found).hex())
        return found
    told: Found = _await_word(store, key, 0)
    return told


def told_by_all(key: str, find: Callable[[], Found]) -> list[Found]:
    """What ``find`` gives on each rank, by rank, on every rank; ``key`` is used once in the life of the process group.

    Ranks may take very different times. Raises ``RuntimeError`` naming a rank that failed or is gone.
    """
    store = c10d.PrefixStore("told-by-all", c10d._get_default_store())
    own = f"{key}/{dist.get_rank()}"
    try:
        store.set(own, pickle.dumps(find()).hex())
    except BaseException as error:
        store.set(own, FAILED + str(error))
        raise
    return [_await_word(store, f"{key}/{rank}", rank) for rank in range(dist.get_world_size())]


def _await_word(store: c10d.Store, key: str, rank: int) -> Any:
    ends_at = time.monotonic() + LONGEST_SECONDS
    while not store.check([key]) and time.monotonic() < ends_at:
        time.sleep(POLL_SECONDS)
    word = store.get(key).decode()
    if word.startswith(FAILED):
        raise RuntimeError(f"rank {rank} could not say: {word.removeprefix(FAILED)}")
    return pickle.loads(bytes.fromhex(word))  # noqa: S301  from a rank of the same gang
