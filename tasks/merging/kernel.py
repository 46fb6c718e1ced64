"""The arithmetic of a merge, on one chunk: a weighted sum in input order, one rounding to the output dtype.

NumPy only: importing torch would cost a merge worker seconds. Every operation is an elementwise
IEEE multiplication, addition or conversion with its own rounding (nothing is fused), so the result
of an element depends on its inputs, the weights and the dtypes, never on where a chunk was cut.

Accumulation is float32 for inputs of up to 32 bits and float64 for float64, unless a policy asks for
more. For N inputs x_i and weights w_i the float32 sum s obeys
|s - sum(w_i x_i)| <= (N + 2) * 2**-24 * sum(|w_i x_i|), to first order (weights are rounded to
float32: 1; products: 1; the sums: N - 1; and slack of 1); the output dtype adds half a unit in its
last place. Where all weights are equal the inputs are added first and the sum is multiplied once, which
obeys the same bound and saves a third of the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

FLOAT_DTYPES = ("F64", "F32", "BF16", "F16")
_STORED = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.uint8,
}  # fmt: skip
BLOCK_ELEMENTS = 1 << 17
"""Elements added at a time: what an addition touches stays in the second-level cache."""
_BF16_INFINITY = 0x7F80
_QUIET_NAN = np.uint32(0x7FC00000)
_UPPER_HALF = np.uint32(0xFFFF0000)
_SIXTEEN = np.uint32(16)
_ONE = np.uint32(1)
_HALF_UNIT = np.uint32(0x7FFF)


class ChunkSum(Protocol):
    """Accumulates one chunk over the inputs; buffers are reused from chunk to chunk."""

    def add(self, data: memoryview, dtype: str, weight: float | None, *, first: bool) -> None:
        """Add ``weight`` times the elements stored as ``dtype`` in ``data``; ``first`` starts a new sum, None adds them as they are."""

    def store(self, size: int, dtype: str, scale: float | None = None) -> tuple[memoryview, int | None]:
        """The first ``size`` sums, times ``scale``, rounded to ``dtype``; and the index of the first that is not finite, or None.

        The bytes are overwritten by the next call.
        """


def new_sum(size: int, read_dtypes: Sequence[str], read_as: str | None, accumulate: str) -> ChunkSum:
    """The fastest sum of up to ``size`` elements for inputs of ``read_dtypes``; all kinds give the same bits.

    ``read_as`` rounds every input to that dtype before it is added (None: as stored); ``accumulate`` is ``F32`` or ``F64``.
    """
    if accumulate == "F32" and read_as in (None, "BF16") and set(read_dtypes) == {"BF16"}:
        return Bfloat16Sum(size)
    return PlainSum(size, read_as, accumulate)


class PlainSum:
    """Elements in their own order, for any mix of float dtypes."""

    def __init__(self, size: int, read_as: str | None, accumulate: str) -> None:
        self._read_as = read_as
        self._sum: NDArray[Any] = np.empty(size, _STORED[accumulate])
        self._term: NDArray[Any] = np.empty(min(size, BLOCK_ELEMENTS), _STORED[accumulate])

    def add(self, data: memoryview, dtype: str, weight: float | None, *, first: bool) -> None:
        """As :meth:`ChunkSum.add`."""
        stored: NDArray[Any] = np.frombuffer(data, dtype=_STORED[dtype])
        kind = self._sum.dtype
        scale = None if weight is None else kind.type(weight)
        # What is not finite stays so, and is found in the result.
        with np.errstate(over="ignore", invalid="ignore"):
            for start in range(0, len(stored), BLOCK_ELEMENTS):
                values = self._decode(stored[start : start + BLOCK_ELEMENTS], dtype)
                total = self._sum[start : start + len(values)]
                if first:
                    np.multiply(values, 1 if scale is None else scale, out=total, dtype=kind)
                elif scale is None:
                    np.add(total, values, out=total, dtype=kind)
                else:
                    term = self._term[: len(values)]
                    np.multiply(values, scale, out=term, dtype=kind)
                    np.add(total, term, out=total)

    def store(self, size: int, dtype: str, scale: float | None = None) -> tuple[memoryview, int | None]:
        """As :meth:`ChunkSum.store`."""
        total = self._sum[:size]
        _scale([total], scale)
        stored = encode(total, dtype)
        return _bytes_of(stored), first_nonfinite(stored, dtype)

    def _decode(self, stored: NDArray[Any], dtype: str) -> NDArray[Any]:
        values = widen(stored) if dtype == "BF16" else stored
        if self._read_as in (None, dtype):
            return values
        rounded = encode(values, self._read_as)
        return widen(rounded) if self._read_as == "BF16" else rounded


class Bfloat16Sum:
    """float32 sums of bfloat16 inputs, two elements to a machine word.

    A little-endian 32-bit word holds an even element in its lower half and an odd one in its upper half, and
    bfloat16 is the upper half of float32: one shift or one mask decodes half of the elements, and the
    sums are kept as two planes.
    """

    def __init__(self, size: int) -> None:
        words = -(-size // 2)
        self._even = np.empty(words, np.float32)
        self._odd = np.empty(words, np.float32)
        self._bits = np.empty(min(words, BLOCK_ELEMENTS // 2), np.uint32)
        self._out: NDArray[Any] = np.empty(words, np.uint32)

    def add(self, data: memoryview, dtype: str, weight: float | None, *, first: bool) -> None:
        """As :meth:`ChunkSum.add`."""
        assert dtype == "BF16"
        pairs = np.frombuffer(data, np.uint32, count=len(data) // 4)
        scale = None if weight is None else np.float32(weight)
        with np.errstate(over="ignore", invalid="ignore"):
            for start in range(0, len(pairs), BLOCK_ELEMENTS // 2):
                block = pairs[start : start + BLOCK_ELEMENTS // 2]
                bits = self._bits[: len(block)]
                np.left_shift(block, _SIXTEEN, out=bits)
                _accumulate(self._even[start : start + len(block)], bits, scale, first=first)
                np.bitwise_and(block, _UPPER_HALF, out=bits)
                _accumulate(self._odd[start : start + len(block)], bits, scale, first=first)
            if len(data) % 4:
                last = np.frombuffer(data[-2:], np.uint16).astype(np.uint32) << _SIXTEEN
                _accumulate(self._even[len(pairs) : len(pairs) + 1], last, scale, first=first)
                self._odd[len(pairs)] = 0

    def store(self, size: int, dtype: str, scale: float | None = None) -> tuple[memoryview, int | None]:
        """As :meth:`ChunkSum.store`."""
        words = -(-size // 2)
        even, odd = self._even[:words], self._odd[:words]
        _scale([even, odd], scale)
        if dtype == "BF16":
            out = self._out[:words]
            with np.errstate(over="ignore", invalid="ignore"):
                np.bitwise_and(_rounded(odd), _UPPER_HALF, out=out)
                np.bitwise_or(out, _rounded(even) >> _SIXTEEN, out=out)
            stored: NDArray[Any] = out.view(np.uint16)[:size]
        else:
            both = np.empty(2 * words, np.float32)
            both[0::2], both[1::2] = even, odd
            stored = encode(both[:size], dtype)
        return _bytes_of(stored), first_nonfinite(stored, dtype)


def _accumulate(total: NDArray[np.float32], bits: NDArray[np.uint32], scale: np.float32 | None, *, first: bool) -> None:
    values = bits.view(np.float32)
    if scale is not None:
        np.multiply(values, scale, out=values)
    if first:
        total[:] = values
    else:
        np.add(total, values, out=total)


def _bytes_of(stored: NDArray[Any]) -> memoryview:
    return memoryview(stored.view(np.uint8))  # type: ignore[arg-type]  # NumPy's stubs do not call arrays buffers


def _scale(planes: Sequence[NDArray[Any]], scale: float | None) -> None:
    if scale is not None:
        with np.errstate(over="ignore", invalid="ignore"):
            for plane in planes:
                np.multiply(plane, plane.dtype.type(scale), out=plane)


def _rounded(values: NDArray[np.float32]) -> NDArray[np.uint32]:
    """float32 bits whose upper half is the nearest bfloat16, ties to even; a NaN stays one."""
    bits = values.view(np.uint32)
    rounded = bits >> _SIXTEEN
    np.bitwise_and(rounded, _ONE, out=rounded)
    np.add(rounded, _HALF_UNIT, out=rounded)
    np.add(rounded, bits, out=rounded)
    if (bad := np.isnan(values)).any():
        # Rounding by addition would carry a NaN with a large payload over to zero.
        rounded[bad] = _QUIET_NAN
    return rounded


def widen(stored: NDArray[np.uint16]) -> NDArray[np.float32]:
    """float32 values of bfloat16 bit patterns."""
    widened = stored.astype(np.uint32)
    np.left_shift(widened, _SIXTEEN, out=widened)
    return widened.view(np.float32)


def recode(data: bytes | bytearray, stored: str, wanted: str | None) -> tuple[bytes, str]:
    """Elements stored as one dtype as bytes of ``wanted``, rounded once, and the dtype they then have; integers stay."""
    if wanted in (None, stored) or stored not in FLOAT_DTYPES:
        return bytes(data), stored
    values: NDArray[Any] = np.frombuffer(data, _STORED[stored])
    return encode(widen(values) if stored == "BF16" else values, str(wanted)).tobytes(), str(wanted)


def encode(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    """``values`` rounded once, to nearest even, to ``dtype``; a bfloat16 result is its bit pattern."""
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype != "BF16":
            return values.astype(_STORED[dtype], copy=False)
        narrow = _round_to_odd(values) if values.dtype == np.float64 else values.astype(np.float32, copy=False)
        return (_rounded(narrow) >> _SIXTEEN).astype(np.uint16)


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


def first_nonfinite_stored(data: bytes | bytearray | memoryview, dtype: str) -> int | None:
    """As :func:`first_nonfinite`, on bytes as they lie in a checkpoint."""
    return first_nonfinite(np.frombuffer(data, dtype=_STORED[dtype]), dtype)
