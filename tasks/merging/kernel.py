"""The arithmetic of a merge, on one chunk: a weighted sum in input order, one rounding to the output dtype.

NumPy only: importing torch would cost a merge worker seconds. Every operation is an elementwise
IEEE multiplication, addition or conversion with its own rounding (nothing is fused), so the result
of an element depends on its inputs, the weights and the dtypes, never on where a chunk was cut.

Accumulation is float32 for inputs of up to 32 bits and float64 for float64. For N inputs x_i and
weights w_i the float32 sum s obeys |s - sum(w_i x_i)| <= (N + 2) * 2**-24 * sum(|w_i x_i|), to
first order (weights are rounded to float32: 1; products: 1; the sums: N - 1; and slack of 1); the
output dtype adds half a unit in its last place.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

FLOAT_DTYPES = ("F64", "F32", "BF16", "F16")
_STORED = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.uint8,
}  # fmt: skip
_BF16_INFINITY = 0x7F80
_QUIET_NAN = np.uint32(0x7FC00000)


class ChunkSum:
    """Accumulates one chunk of ``size`` elements over the inputs; buffers are reused from chunk to chunk."""

    def __init__(self, size: int, read_dtype: str) -> None:
        self.read_dtype = read_dtype
        self.dtype = np.float64 if read_dtype == "F64" else np.float32
        self._sum: NDArray[Any] = np.empty(size, self.dtype)
        self._term: NDArray[Any] = np.empty(size, self.dtype)
        self._widened = np.empty(size, np.uint32) if read_dtype == "BF16" else None

    def add(self, data: bytes, weight: float, *, first: bool) -> None:
        """Add ``weight`` times the elements stored in ``data``; the first input starts the sum."""
        values = self._decode(data)
        scale = self.dtype(weight)
        total = self._sum[: len(values)]
        # What is not finite stays so, and is found in the result.
        with np.errstate(over="ignore", invalid="ignore"):
            if first:
                np.multiply(values, scale, out=total, dtype=self.dtype)
            else:
                term = self._term[: len(values)]
                np.multiply(values, scale, out=term, dtype=self.dtype)
                np.add(total, term, out=total)

    def result(self, size: int) -> NDArray[Any]:
        """The first ``size`` sums, a view that the next chunk overwrites."""
        return self._sum[:size]

    def _decode(self, data: bytes) -> NDArray[Any]:
        stored: NDArray[Any] = np.frombuffer(data, dtype=_STORED[self.read_dtype])
        if self._widened is None:
            return stored
        # bfloat16 is the upper half of float32.
        widened = self._widened[: len(stored)]
        np.left_shift(stored, 16, out=widened, dtype=np.uint32, casting="unsafe")
        return widened.view(np.float32)


def encode(values: NDArray[np.floating], dtype: str) -> NDArray[Any]:
    """``values`` rounded once, to nearest even, to ``dtype``; a bfloat16 result is its bit pattern."""
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype != "BF16":
            return values.astype(_STORED[dtype], copy=False)
        narrow = _round_to_odd(values) if values.dtype == np.float64 else values.astype(np.float32)
        bits = narrow.view(np.uint32)
    if not np.isfinite(values).all():
        # Rounding by addition would carry a NaN with a large payload over to zero.
        bits[np.isnan(values)] = _QUIET_NAN
    return ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)


def _round_to_odd(values: NDArray[np.floating]) -> NDArray[np.float32]:
    """float32 such that one more rounding, to a shorter format, equals rounding ``values`` once.

    Towards zero, with the last bit set where anything was lost (Boldo and Melquiond, 2008).
    """
    near = values.astype(np.float32)
    back = near.astype(np.float64)
    bits = near.view(np.uint32)
    inexact = np.isfinite(values) & (back != values)
    bits[inexact & (np.abs(back) > np.abs(values))] -= np.uint32(1)
    bits[inexact] |= np.uint32(1)
    return near


def first_nonfinite(stored: NDArray[Any], dtype: str) -> int | None:
    """Index of the first infinity or NaN among stored elements, or None."""
    finite = (stored & 0x7FFF) < _BF16_INFINITY if dtype == "BF16" else np.isfinite(stored)
    return None if finite.all() else int(np.argmin(finite))


def first_nonfinite_stored(data: bytes, dtype: str) -> int | None:
    """As :func:`first_nonfinite`, on bytes as they lie in a checkpoint."""
    return first_nonfinite(np.frombuffer(data, dtype=_STORED[dtype]), dtype)
