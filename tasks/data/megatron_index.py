r"""Megatron's ``.idx``: where the sequences and documents of a ``.bin`` lie.

Layout, little-endian (``megatron/core/datasets/indexed_dataset.py``, version 1): magic ``MMIDIDX\0\0``, version
(uint64), dtype code (uint8), number of sequences S and of document borders D (uint64 each); then S lengths in tokens
(int32), S offsets in bytes (int64) and D borders as sequence numbers (int64), the first 0 and the last S.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.storage import RangeReader, Store
from configs.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_VERSION = 1
_DTYPES = {1: "<u1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""Codes of integers that can be token ids; 2 is int8, 6 and 7 are floating point."""
_CODES = {"uint8": 1, "uint16": 8, "uint32": 4}
"""Megatron knows no uint32; ids stay below 2**31, where int32 has the same bytes."""
_CHECKED_AT_ONCE = 1 << 18


@dataclass(frozen=True, kw_only=True)
class MegatronIndex:
    """What an index says, once it is checked."""

    dtype: str
    """Little-endian NumPy dtype of the ``.bin``."""
    tokens: int
    """Tokens of the ``.bin``."""
    sequences: int
    """Sequences."""
    documents: int
    """Documents; one may be of several sequences."""


def build_index(lengths: NDArray[np.int32], dtype: np.dtype[Any]) -> Iterator[bytes]:
    """The index of documents of ``lengths`` tokens that lie one after the other, one sequence each."""
    count = len(lengths)
    yield _HEADER.pack(MAGIC, _VERSION, _CODES[dtype.name], count, count + 1)
    yield lengths.astype("<i4").tobytes()
    ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
    yield np.concatenate([np.zeros(min(count, 1), np.int64), ends[:-1]]).astype("<i8").tobytes()
    yield np.arange(count + 1, dtype="<i8").tobytes()


def read_index(store: Store, key: str, bin_bytes: int, *, thorough: bool = True) -> MegatronIndex:
    """Check the index at ``key`` against itself and the size of its ``.bin``, a piece at a time.

    Without ``thorough`` its header alone is read, and the ``.bin`` is taken to be what it says.
    Raises :class:`configs.errors.UserError` for one that is cut off, made up, or of sequences that do not lie one
    after the other.
    """
    name, size = f"{store.url}/{key}", store.size(key)
    if size < _HEADER.size:
        raise UserError(f"{name}: {size} bytes are too few for a Megatron index; copy it again")
    magic, version, code, sequences, borders = _HEADER.unpack(store.read_range(key, 0, _HEADER.size))
    if magic != MAGIC:
        raise UserError(f"{name}: begins with {magic!r}, not {MAGIC!r}; it is no Megatron index")
    if version != _VERSION:
        raise UserError(f"{name}: version {version} is not known; known: {_VERSION}")
    if code not in _DTYPES:
        raise UserError(f"{name}: dtype code {code} is not of token ids; known: {sorted(_DTYPES)}")
    expected = _HEADER.size + 12 * sequences + 8 * borders
    if size != expected:
        raise UserError(
            f"{name}: {size:,} bytes, but {sequences:,} sequences and {borders:,} document borders need {expected:,}; "
            "it is cut off, or multimodal"
        )
    itemsize = np.dtype(_DTYPES[code]).itemsize
    tokens = bin_bytes // itemsize
    if thorough:
        reader = store.open_reader(key)
        try:
            index = _Sections(reader, name, sequences, borders)
            tokens = index.check_sequences(itemsize)
            index.check_documents()
        finally:
            reader.close()
    if tokens * itemsize != bin_bytes:
        raise UserError(f"{name}: its sequences need {tokens * itemsize:,} bytes, the .bin has {bin_bytes:,}")
    return MegatronIndex(dtype=_DTYPES[code], tokens=tokens, sequences=sequences, documents=max(0, borders - 1))


@dataclass(frozen=True)
class _Sections:
    """The three arrays of an index whose size fits its header."""

    reader: RangeReader
    name: str
    sequences: int
    borders: int

    def check_sequences(self, itemsize: int) -> int:
        """Tokens of all sequences, which must lie one after the other from byte 0."""
        lengths_at, offsets_at = _HEADER.size, _HEADER.size + 4 * self.sequences
        position = 0
        for first in range(0, self.sequences, _CHECKED_AT_ONCE):
            count = min(_CHECKED_AT_ONCE, self.sequences - first)
            lengths = self._array(lengths_at + 4 * first, count, "<i4").astype(np.int64)
            if lengths.min() < 0:
                raise UserError(f"{self.name}: sequence {first + int(lengths.argmin())} has a negative length")
            ends = position + np.cumsum(lengths) * itemsize
            starts = np.concatenate([[position], ends[:-1]])
            wrong = np.flatnonzero(self._array(offsets_at + 8 * first, count, "<i8") != starts)
            if len(wrong):
                raise UserError(
                    f"{self.name}: sequence {first + int(wrong[0])} does not begin where the one before it ends; "
                    "write the data set again, in order"
                )
            position = int(ends[-1])
        return position // itemsize

    def check_documents(self) -> None:
        """Document borders must rise from 0 to the number of sequences."""
        at = _HEADER.size + 12 * self.sequences
        last = 0
        for first in range(0, self.borders, _CHECKED_AT_ONCE):
            count = min(_CHECKED_AT_ONCE, self.borders - first)
            borders = self._array(at + 8 * first, count, "<i8")
            rising = np.all(np.diff(borders) >= 0) and borders[0] >= last
            if not rising or (first == 0 and borders[0] != 0):
                raise UserError(f"{self.name}: its document borders do not rise from 0; write the index again")
            last = int(borders[-1])
        if last != self.sequences:
            raise UserError(f"{self.name}: its documents end at sequence {last} of {self.sequences}")

    def _array(self, start: int, count: int, dtype: str) -> NDArray[Any]:
        data = bytearray(count * np.dtype(dtype).itemsize)
        self.reader.read_into(start, memoryview(data))
        return np.frombuffer(data, dtype=dtype)
