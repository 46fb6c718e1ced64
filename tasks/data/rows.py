"""Rows of tokens that windows are cut from: text in memory, or flat token files read by range."""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from cluster.storage import scheme_of
from tasks.checkpoints.digest import digest_bytes, fingerprint
from tasks.data.corpus import Corpus, Side
from tasks.data.token_files import TokenFile, TokenReader

Item = TypeVar("Item")
Result = TypeVar("Result")
_READS_AT_ONCE = 8
_LOOKED_BACK_TOKENS = 1 << 20
_LOOKED_AT_ONCE = 1 << 16
_SAMPLED_TOKENS = 1 << 14
_SAMPLES = 32


@dataclass(frozen=True, kw_only=True)
class RowVocabulary:
    """What is known of the ids of a row; None where nobody has said it."""

    size: int | None
    """All ids are below it."""
    end_of_document: int | None
    """Id that ends every document."""
    digest: str | None
    """Digest of the vocabulary: rows of one run must agree."""


class Row(Protocol):
    """One side of a domain, opened."""

    @property
    def vocabulary(self) -> RowVocabulary:
        """What is known of its ids."""

    @property
    def digest(self) -> str:
        """Identity of the tokens, wherever they lie."""

    def close(self) -> None:
        """Give up open files and threads."""


class TokenRow(Row, Protocol):
    """One side of a domain, as one long row of tokens."""

    num_tokens: int
    """Tokens of the row."""

    def read_windows(self, starts: NDArray[np.int64], length: int) -> NDArray[np.int64]:
        """Tokens ``[len(starts), length]`` from ``starts``, which lie inside the row.

        Raises :class:`cluster.errors.StorageError` naming the file if storage fails.
        """

    def place_of(self, position: int) -> str:
        """Where the token at ``position`` is stored, for messages."""


class TextRow:
    """Text in memory."""

    def __init__(self, corpus: Corpus, vocabulary: RowVocabulary) -> None:
        self.tokens, self.digest, self.vocabulary = corpus.tokens, corpus.digest, vocabulary
        self.num_tokens = len(corpus.tokens)

    def read_windows(self, starts: NDArray[np.int64], length: int) -> NDArray[np.int64]:
        """Rows gathered from memory."""
        windows: NDArray[np.int64] = self.tokens[starts[:, None] + np.arange(length)].astype(np.int64)
        return windows

    def place_of(self, position: int) -> str:
        """Position in the text."""
        return f"token {position:,} of the text"

    def close(self) -> None:
        """Nothing is open."""


class TokenFileRow:
    """Flat token files, read by range and never whole; a few reads at once where storage is behind a network."""

    def __init__(self, files: Sequence[TokenFile], vocabulary: RowVocabulary, content: str | None) -> None:
        """``content`` is the digest of the files where a manifest says it, and with it how large ids are."""
        self.files = tuple(file for file in files if file.tokens)
        self.vocabulary, self._content = vocabulary, content
        self._reader = TokenReader(self.files) if self.files else None
        self.num_tokens = self._reader.num_tokens if self._reader else 0
        self._ends = list(itertools.accumulate(file.tokens for file in self.files))
        self._pool: ThreadPoolExecutor | None = None
        if any(is_remote(file.url) for file in self.files):
            self._pool = ThreadPoolExecutor(_READS_AT_ONCE, thread_name_prefix="read-tokens")

    @property
    def has_manifest(self) -> bool:
        """Whether whoever wrote the files wrote down what they hold."""
        return self._content is not None

    @functools.cached_property
    def digest(self) -> str:
        """Digest of the files and of which tokens of them belong to this row.

        Files without a manifest are known by their sizes and three stretches each: hashing terabytes at every start
        would cost more than it finds.
        """
        pieces = [[file.first_byte, file.tokens, file.dtype] for file in self.files]
        content = self._content or self._map(sample_digest, self.files)
        return fingerprint({"content": content, "pieces": pieces})

    def read_windows(self, starts: NDArray[np.int64], length: int) -> NDArray[np.int64]:
        """Rows read by range."""
        assert self._reader is not None, "an empty row has no windows"
        reader = self._reader
        found = self._map(lambda start: reader.read(start, start + length), starts.tolist())
        return np.stack(found).astype(np.int64) if found else np.empty((0, length), dtype=np.int64)

    def place_of(self, position: int) -> str:
        """File and byte."""
        number = bisect.bisect_right(self._ends, position)
        file = self.files[number]
        offset = position - (self._ends[number] - file.tokens)
        return f"{file.url}, byte {file.first_byte + offset * np.dtype(file.dtype).itemsize:,}"

    def close(self) -> None:
        """Give up open files and threads."""
        if self._reader:
            self._reader.close()
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def _map(self, work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        return [work(item) for item in items] if self._pool is None else list(self._pool.map(work, items))


def is_remote(url: str) -> bool:
    """Whether reading waits for a network."""
    return scheme_of(url) not in {"file", "memory"}


def side_of(file: TokenFile, side: Side, *, fraction: float, end_of_document: int | None) -> TokenFile:
    """The part of a token file that is on ``side``: its tail is held out.

    The tail has ``floor(fraction * tokens)`` tokens and begins where a document does, if the end of one is found
    among the 2**20 tokens before: then the tail is longer by the rest of that document.
    """
    cut = file.tokens - int(file.tokens * fraction)
    if cut < file.tokens and end_of_document is not None:
        cut = _border_before(file, cut, end_of_document)
    if side == "train":
        return replace(file, tokens=cut)
    itemsize = np.dtype(file.dtype).itemsize
    return replace(file, first_byte=file.first_byte + cut * itemsize, tokens=file.tokens - cut)


def sample_digest(file: TokenFile) -> str:
    """Digest of the first, middle and last 16,384 tokens of a file's piece."""
    starts = {0, file.tokens // 2, max(0, file.tokens - _SAMPLED_TOKENS)}
    reader = TokenReader([file])
    try:
        pieces = [reader.read(start, min(file.tokens, start + _SAMPLED_TOKENS)) for start in sorted(starts)]
    finally:
        reader.close()
    return digest_bytes(b"".join(piece.tobytes() for piece in pieces))


def find_id_beyond(row: TokenRow, vocabulary_size: int) -> int | None:
    """Position of a token that is no id below ``vocabulary_size``, among 32 stretches spread over the row; None if all are."""
    length = min(_SAMPLED_TOKENS, row.num_tokens)
    starts = np.unique(np.linspace(0, row.num_tokens - length, _SAMPLES).astype(np.int64))
    for start in starts:
        wrong = first_beyond(row.read_windows(np.array([start]), length)[0], vocabulary_size)
        if wrong is not None:
            return int(start) + wrong
    return None


def first_beyond(tokens: NDArray[np.integer[Any]], vocabulary_size: int) -> int | None:
    """Index in flat order of the first token that is no id below ``vocabulary_size``, or None."""
    # One pass each in the usual case, without an array of comparisons.
    if not tokens.size or (int(tokens.max()) < vocabulary_size and int(tokens.min()) >= 0):
        return None
    return int(np.flatnonzero((tokens >= vocabulary_size) | (tokens < 0))[0])


def _border_before(file: TokenFile, cut: int, end_of_document: int) -> int:
    reader = TokenReader([file])
    try:
        end = cut
        while end > max(0, cut - _LOOKED_BACK_TOKENS):
            start = max(0, end - _LOOKED_AT_ONCE)
            ends = np.flatnonzero(reader.read(start, end) == end_of_document)
            if len(ends):
                return start + int(ends[-1]) + 1
            end = start
    finally:
        reader.close()
    return cut
