"""Tokenize a unit of sources into shards that no number of workers and no kill changes.

A unit is cut off the sources by their sizes alone, and a shard off a unit's documents by their tokens alone. A
receipt follows each shard, so that a unit that is begun again tokenizes only what has none.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.data_files import DataFile
from cluster.errors import ObjectExists
from cluster.storage import ObjectWriter, Store
from configs.errors import UserError
from configs.typed import parse_record
from tasks.checkpoints.digest import digest_bytes, new_hasher
from tasks.data.documents import (
    Document,
    DocumentOptions,
    Record,
    Skipped,
    Stretch,
    is_divisible,
    read_documents,
    skip_or_refuse,
    whole,
)
from tasks.data.megatron_index import build_index
from tasks.data.token_manifest import TokenPlan, TokenShard, encode_record
from tasks.data.vocabulary import Ids, Vocabulary, dtype_of

RECEIPTS = "receipts"
_FLUSH_BYTES = 4 << 20
_COMPARED_AT_ONCE = 8 << 20


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Neighbouring stretches of the sources that one worker tokenizes."""

    number: int
    """Its place, from 0."""
    stretches: tuple[Stretch, ...]
    """What to read, in order."""
    bytes: int
    """Size of what it reads, before decompression."""


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """One shard of a unit and what was read for it; the last of a unit may have no shard."""

    shard: TokenShard | None
    """The shard."""
    records: int
    """Documents read for it, the ones left out among them."""
    empty: int
    """Left out as empty."""
    malformed: int
    """Left out as malformed."""
    is_last: bool
    """Whether the unit ends here."""


@dataclass(frozen=True, kw_only=True)
class UnitResult:
    """A finished unit."""

    unit: Unit
    """Which."""
    receipts: tuple[Receipt, ...]
    """Its shards in order."""
    bytes_read: int
    """Of the sources, this time."""
    bytes_written: int
    """To shards and indices, this time."""


def cut_units(files: Sequence[DataFile], options: DocumentOptions, unit_bytes: int) -> tuple[Unit, ...]:
    """Cut the sources into units of about ``unit_bytes``, by names and sizes alone."""
    groups: list[list[Stretch]] = []
    sizes: list[int] = []
    for stretch, size in itertools.chain.from_iterable(_cut_file(file, options, unit_bytes) for file in files):
        if not groups or sizes[-1] + size > unit_bytes:
            groups.append([])
            sizes.append(0)
        groups[-1].append(stretch)
        sizes[-1] += size
    return tuple(
        Unit(number=number, stretches=tuple(group), bytes=size)
        for number, (group, size) in enumerate(zip(groups, sizes, strict=True))
    )


def tokenize_unit(store: Store, unit: Unit, plan: TokenPlan, vocabulary: Vocabulary) -> UnitResult:
    """Write the shards of ``unit`` that have no receipt yet; returns all of its receipts.

    Safe to run twice, also at once: an object that stands with the same bytes counts as written. Raises
    :class:`configs.errors.UserError` for documents that cannot be read and for objects of other bytes.
    """
    receipts = list(_standing_receipts(store, unit))
    if receipts and receipts[-1].is_last:
        return UnitResult(unit=unit, receipts=tuple(receipts), bytes_read=0, bytes_written=0)
    records: Iterator[Record] = itertools.chain.from_iterable(
        read_documents(stretch, plan.options) for stretch in unit.stretches
    )
    read = sum(receipt.records for receipt in receipts)
    encoded = _Encoded(itertools.islice(records, read, None), plan.options, vocabulary)
    written = 0
    while not receipts or not receipts[-1].is_last:
        receipt = _write_shard(store, f"tokens-{unit.number:05d}-{len(receipts):05d}", encoded, plan)
        _create_or_compare(store, _receipt_key(unit, len(receipts)), encode_record(receipt))
        receipts.append(receipt)
        written += receipt.shard.bytes + receipt.shard.index_bytes if receipt.shard else 0
    return UnitResult(unit=unit, receipts=tuple(receipts), bytes_read=unit.bytes, bytes_written=written)


class _Encoded:
    """Token ids of documents, one looked at ahead, and counts of what was read."""

    def __init__(self, records: Iterator[Record], options: DocumentOptions, vocabulary: Vocabulary) -> None:
        self._records, self._options, self._vocabulary = records, options, vocabulary
        self.counts = dict.fromkeys(("records", "empty", "malformed"), 0)
        self.ahead: Ids | None = None
        self._advance()

    def take(self) -> Ids:
        """The document ahead; the next one moves up."""
        ids = self.ahead
        assert ids is not None
        self.counts["records"] += 1
        self._advance()
        return ids

    def take_counts(self) -> dict[str, int]:
        """Counts since the last call."""
        counts, self.counts = self.counts, dict.fromkeys(self.counts, 0)
        return counts

    def _advance(self) -> None:
        self.ahead = None
        for record in self._records:
            checked = self._checked(record)
            if isinstance(checked, Document):
                self.ahead = self._vocabulary.encode(checked.text)
                return
            self.counts["records"] += 1
            self.counts[checked.reason] += 1

    def _checked(self, record: Record) -> Document | Skipped:
        if isinstance(record, Document) and (problem := self._vocabulary.problem_of(record.text)):
            return skip_or_refuse(record.place, problem, self._options)
        return record


def _write_shard(store: Store, stem: str, documents: _Encoded, plan: TokenPlan) -> Receipt:
    if documents.ahead is None:
        return Receipt(shard=None, is_last=True, **documents.take_counts())
    key, dtype = f"{stem}.bin", dtype_of(plan.vocabulary_size)
    written = _write_bin(store, key, documents, plan.shard_tokens)
    index = b"".join(build_index(np.frombuffer(written.lengths, dtype=np.int32), dtype))
    _create_or_compare(store, f"{stem}.idx", index)
    shard = TokenShard(
        key=key,
        tokens=written.bytes // dtype.itemsize,
        documents=len(written.lengths),
        bytes=written.bytes,
        digest=written.digest(),
        index_bytes=len(index),
        index_digest=digest_bytes(index),
    )
    return Receipt(shard=shard, is_last=documents.ahead is None, **documents.take_counts())


def _write_bin(store: Store, key: str, documents: _Encoded, shard_tokens: int) -> _HashedBin:
    written = _HashedBin()
    if store.exists(key):  # of an attempt that ended before its receipt
        written.fill(None, documents, shard_tokens)
        _require_same(store, key, written.bytes, written.digest())
        return written
    try:
        with store.create_stream(key) as out:
            written.fill(out, documents, shard_tokens)
    except ObjectExists:  # of another driver, just now
        if not written.bytes:
            written.fill(None, documents, shard_tokens)
        _require_same(store, key, written.bytes, written.digest())
    return written


class _HashedBin:
    """Counts and hashes what is written to one shard."""

    def __init__(self) -> None:
        self.bytes = 0
        self.lengths = array("i")
        self._hasher = new_hasher()

    def fill(self, out: ObjectWriter | None, documents: _Encoded, shard_tokens: int) -> None:
        """Take whole documents up to ``shard_tokens`` tokens, but at least one; without ``out`` only look at them."""
        tokens, buffer = 0, bytearray()
        while documents.ahead is not None and (not tokens or tokens + len(documents.ahead) <= shard_tokens):
            ids = documents.take()
            tokens += len(ids)
            self.lengths.append(len(ids))
            buffer += ids.tobytes()
            if len(buffer) >= _FLUSH_BYTES:
                self._put(out, bytes(buffer))
                buffer.clear()
        self._put(out, bytes(buffer))

    def digest(self) -> str:
        """BLAKE3 of what was written."""
        return str(self._hasher.hexdigest())

    def _put(self, out: ObjectWriter | None, data: bytes) -> None:
        self._hasher.update(data)
        self.bytes += len(data)
        if out is not None:
            out.write(data)


def _cut_file(file: DataFile, options: DocumentOptions, unit_bytes: int) -> Iterator[tuple[Stretch, int]]:
    pieces = max(1, -(-file.bytes // unit_bytes)) if is_divisible(file, options) else 1
    for number in range(pieces):
        start, end = (file.bytes * place // pieces for place in (number, number + 1))
        yield dataclasses.replace(whole(file), start=start, end=end), end - start


def _standing_receipts(store: Store, unit: Unit) -> Iterator[Receipt]:
    for number in itertools.count():
        key = _receipt_key(unit, number)
        data = store.read_if_present(key)
        if data is None:
            return
        try:
            receipt = parse_record(Receipt, json.loads(data))
        except (ValueError, TypeError) as error:
            raise UserError(f"{store.url}/{key}: is no receipt ({error}); delete it and run again") from None
        yield receipt
        if receipt.is_last:
            return


def _receipt_key(unit: Unit, number: int) -> str:
    return f"{RECEIPTS}/{unit.number:05d}-{number:05d}.json"


def _create_or_compare(store: Store, key: str, data: bytes) -> None:
    try:
        store.create(key, data)
    except ObjectExists:
        _require_same(store, key, len(data), digest_bytes(data))


def _require_same(store: Store, key: str, size: int, digest: str) -> None:
    standing = store.size(key)
    hasher = new_hasher()
    for start in range(0, standing if standing == size else 0, _COMPARED_AT_ONCE):
        hasher.update(store.read_range(key, start, min(start + _COMPARED_AT_ONCE, size)))
    if standing != size or str(hasher.hexdigest()) != digest:
        raise UserError(
            f"{store.url}/{key} holds other bytes than these sources give; it was damaged, or the sources changed while "
            "they were read: choose another output, or delete this one and run again"
        )
