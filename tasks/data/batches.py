"""Which tokens a step sees: pure index arithmetic on (seed, step), whatever the number of workers.

The corpus is cut into windows of S tokens. Each epoch visits every window once, in an order given by
a keyed permutation (a Feistel network with cycle walking) that is evaluated per index, so that any
position of any epoch is reached without state.
"""

from __future__ import annotations

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from configs.errors import UserError

_ROUNDS = 4


def num_windows(num_tokens: int, sequence_length: int) -> int:
    """Windows of S tokens plus one target that ``num_tokens`` hold."""
    return max(0, (num_tokens - 1) // sequence_length)


def windows_at(counters: NDArray[np.int64], windows: int, *, order: str | None) -> NDArray[np.int64]:
    """Windows ``[n]`` that a domain's sequences number ``counters`` ``[n]`` read, of ``windows`` an epoch.

    ``order`` is the key that each epoch's order is drawn by; None reads the windows as they lie, each epoch alike.
    """
    if windows < 1:
        raise UserError("the text has fewer tokens than one training sequence; give more text or a shorter one")
    epochs, positions = np.divmod(counters, windows)
    if order is None:
        return positions
    result = np.empty(len(counters), dtype=np.int64)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        result[chosen] = permute(positions[chosen], windows, key=f"{order}/{epoch}")
    return result


def permute(positions: NDArray[np.int64], size: int, key: str) -> NDArray[np.int64]:
    """Bijection of ``0 .. size-1`` chosen by ``key``, applied to ``positions``."""
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half_bits) - 1)
    material = blake3(key.encode()).digest(8 * _ROUNDS)
    round_keys = np.frombuffer(material, dtype="<u8")
    values = positions.astype(np.uint64)
    pending = np.ones(len(values), dtype=bool)
    while pending.any():
        values[pending] = _feistel(values[pending], round_keys, half_bits, mask)
        pending = values >= size
    return values.astype(np.int64)


def _feistel(
    values: NDArray[np.uint64], round_keys: NDArray[np.uint64], half_bits: int, mask: np.uint64
) -> NDArray[np.uint64]:
    shift = np.uint64(half_bits)
    left, right = values >> shift, values & mask
    for round_key in round_keys:
        left, right = right, left ^ (_mix(right + round_key) & mask)
    return (left << shift) | right


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Finaliser of splitmix64 (Steele, Lea and Flood, 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
