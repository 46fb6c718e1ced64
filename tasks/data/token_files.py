"""Flat token files as one long row of tokens, read by range and never whole.

Known: folders of ``pma tokenize`` (``manifest.json``), Megatron ``.bin`` with ``.idx``, nanoGPT ``.bin`` (bare
uint16), and llm.c ``.bin`` (256 int32 of header: magic, version, number of tokens; ``dev/data/data_common.py``).
"""

from __future__ import annotations

import bisect
import itertools
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.data_files import list_data_files, open_data_store
from cluster.errors import ObjectMissing, StorageError
from cluster.storage import RangeReader, Store
from configs.errors import UserError
from tasks.data.megatron_index import read_index
from tasks.data.token_manifest import FORMAT, MANIFEST_KEY, PLAN_KEY, TokenManifest, parse_token_manifest

_LLMC_HEADER_BYTES = 1024
_LLMC = {20240520: (1, "<u2"), 20240801: (7, "<u4")}
"""Magic: version and dtype, for the GPT-2 and the Llama 3 vocabulary. No two GPT-2 ids spell either magic."""
PLAIN_DTYPE = "<u2"
MAX_OPEN_FILES = 128
"""Files that a reader keeps open: corpora have more shards than a process may open files."""
_OPENED_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True)
class TokenFile:
    """One file of the row."""

    url: str
    """Where it is."""
    first_byte: int
    """Where its tokens begin."""
    tokens: int
    """How many they are."""
    dtype: str
    """Their little-endian NumPy dtype, such as ``<u2``."""


class TokenReader:
    """Tokens of several files, counted from 0 across all of them; safe to use from several threads, and pickled as names."""

    def __init__(self, files: Sequence[TokenFile]) -> None:
        self.files = tuple(files)
        dtypes = sorted({file.dtype for file in self.files})
        if not sum(file.tokens for file in self.files):
            raise UserError("the token files hold no tokens")
        if len(dtypes) > 1:
            raise UserError(f"token files of different dtypes do not go together: {', '.join(dtypes)}; name them apart")
        self.dtype: np.dtype[Any] = np.dtype(dtypes[0])
        self._ends = list(itertools.accumulate(file.tokens for file in self.files))
        self.num_tokens = self._ends[-1]
        self._readers: OrderedDict[int, RangeReader] = OrderedDict()
        self._guard = threading.Lock()

    def __len__(self) -> int:
        return self.num_tokens

    def read(self, start: int, end: int) -> NDArray[np.integer[Any]]:
        """Tokens ``start`` (included) to ``end`` (excluded).

        Raises :class:`IndexError` outside the row and :class:`cluster.errors.StorageError` if storage fails.
        """
        if not 0 <= start <= end <= self.num_tokens:
            raise IndexError(f"tokens {start} to {end} of {self.num_tokens}")
        data = bytearray((end - start) * self.dtype.itemsize)
        target = memoryview(data)
        position, number = start, bisect.bisect_right(self._ends, start)
        while position < end:
            file, first = self.files[number], self._ends[number] - self.files[number].tokens
            count = min(end, self._ends[number]) - position
            if count:
                offset = file.first_byte + (position - first) * self.dtype.itemsize
                at = (position - start) * self.dtype.itemsize
                self._reader(number).read_into(offset, target[at : at + count * self.dtype.itemsize])
            position, number = position + count, number + 1
        return np.frombuffer(data, dtype=self.dtype)

    def close(self) -> None:
        """Give up the open files; a later read opens them again."""
        with self._guard:
            for reader in self._readers.values():
                reader.close()
            self._readers.clear()

    def __getstate__(self) -> tuple[TokenFile, ...]:
        return self.files

    def __setstate__(self, files: tuple[TokenFile, ...]) -> None:
        self.__init__(files)  # type: ignore[misc]

    def _reader(self, number: int) -> RangeReader:
        with self._guard:
            if number not in self._readers:
                store, key = open_data_store(self.files[number].url)
                self._readers[number] = store.open_reader(key)
                if len(self._readers) > MAX_OPEN_FILES:
                    # Not closed here, for another thread may be reading from it: it closes when that one lets go.
                    self._readers.popitem(last=False)
            self._readers.move_to_end(number)
            return self._readers[number]


@dataclass(frozen=True, kw_only=True)
class TokenSet:
    """Token files that one source names."""

    files: tuple[TokenFile, ...]
    """In the order of the row."""
    manifest: TokenManifest | None
    """What ``pma tokenize`` says of them, if they are its."""
    url: str
    """The folder of the manifest, or what the source said."""


def open_tokens(url: str, *, dtype: str | None = None) -> TokenReader:
    """The tokens that ``url`` names: see :func:`find_token_files`."""
    return TokenReader(find_token_files(url, dtype=dtype).files)


def find_token_files(url: str, *, dtype: str | None = None, thorough: bool = True) -> TokenSet:
    """The files of a folder of ``pma tokenize``, a ``.bin``, a Megatron prefix, or a glob of ``.bin``.

    ``dtype`` (``uint8``, ``uint16`` or ``uint32``) is for bare files, which do not say it themselves; without it
    uint16, as nanoGPT writes. Sizes are checked, no tokens are read; with ``thorough`` a Megatron index is read whole and
    checked against itself, without it the sizes that its header claims are. Raises
    :class:`configs.errors.UserError` for what is missing, damaged or of another kind.
    """
    if any(mark in url for mark in "*?["):
        found = [file.url for file in list_data_files(url) if file.url.endswith(".bin")]
        if not found:
            raise UserError(f"{url} names no .bin files")
        with ThreadPoolExecutor(_OPENED_AT_ONCE, thread_name_prefix="open-tokens") as pool:
            return TokenSet(
                files=tuple(pool.map(lambda name: _open_file(name, dtype, thorough), found)), manifest=None, url=url
            )
    if not url.endswith((".bin", ".idx")):
        folder, _ = open_data_store(f"{url.rstrip('/')}/{MANIFEST_KEY}")
        if (data := _read_manifest(folder)) is not None:
            manifest = parse_token_manifest(data, f"{folder.url}/{MANIFEST_KEY}")
            return TokenSet(files=tuple(_manifest_files(folder, manifest)), manifest=manifest, url=folder.url)
    store, key = open_data_store(f"{url.removesuffix('.idx')}.bin" if url.endswith(".idx") else url)
    if store.exists(f"{key}.bin"):
        key = f"{key}.bin"
    elif any(found != key for found in store.keys(key)):
        raise UserError(f"{url} is a folder without {MANIFEST_KEY}: it was not finished; name its files, or a glob")
    return TokenSet(files=(_open_file(f"{store.url}/{key}", dtype, thorough),), manifest=None, url=url)


def is_token_folder(url: str) -> bool:
    """Whether ``url`` is a folder that ``pma tokenize`` writes or wrote."""
    store, _ = open_data_store(f"{url.rstrip('/')}/{MANIFEST_KEY}")
    try:
        found = (store.read_if_present(key) for key in (MANIFEST_KEY, PLAN_KEY))
        return any(data is not None and FORMAT.encode() in data for data in found)
    except StorageError:
        return False  # of a file, or of nothing; reading it as text says what is wrong


def _read_manifest(folder: Store) -> bytes | None:
    try:
        return folder.read_if_present(MANIFEST_KEY)
    except StorageError as error:
        if isinstance(error.__cause__, NotADirectoryError):
            return None  # the URL is of a file
        raise


def _manifest_files(store: Store, manifest: TokenManifest) -> list[TokenFile]:
    dtype = np.dtype(manifest.plan.dtype).newbyteorder("<").str.replace("|", "<")
    for shard in manifest.shards:
        _require_size(store, shard.key, shard.bytes)
    return [
        TokenFile(url=f"{store.url}/{shard.key}", first_byte=0, tokens=shard.tokens, dtype=dtype)
        for shard in manifest.shards
    ]


def _open_file(url: str, dtype: str | None, thorough: bool) -> TokenFile:
    store, key = open_data_store(url)
    size = _size(store, key)
    index_key = f"{key.removesuffix('.bin')}.idx"
    if key.endswith(".bin") and store.exists(index_key):
        index = read_index(store, index_key, size, thorough=thorough)
        return TokenFile(url=url, first_byte=0, tokens=index.tokens, dtype=index.dtype)
    if dtype is None and size >= _LLMC_HEADER_BYTES:
        magic, version, tokens = np.frombuffer(store.read_range(key, 0, 12), dtype="<i4").tolist()
        if magic in _LLMC:
            return _llmc_file(url, size, magic, version, tokens)
    plain = np.dtype(PLAIN_DTYPE if dtype is None else _plain_dtype(dtype))
    if size % plain.itemsize:
        raise UserError(
            f"{url}: {size:,} bytes are no whole number of {plain.name} tokens; it is cut off, or of another dtype"
        )
    return TokenFile(url=url, first_byte=0, tokens=size // plain.itemsize, dtype=plain.str.replace("|", "<"))


def _llmc_file(url: str, size: int, magic: int, version: int, tokens: int) -> TokenFile:
    known, dtype = _LLMC[magic]
    if version != known:
        raise UserError(f"{url}: llm.c version {version} is not known; known with magic {magic}: {known}")
    expected = _LLMC_HEADER_BYTES + tokens * np.dtype(dtype).itemsize
    if tokens < 0 or size != expected:
        raise UserError(
            f"{url}: {size:,} bytes, but its header says {tokens:,} tokens ({expected:,} bytes); copy it again"
        )
    return TokenFile(url=url, first_byte=_LLMC_HEADER_BYTES, tokens=tokens, dtype=dtype)


def _plain_dtype(name: str) -> str:
    known = {"uint8": "<u1", "uint16": "<u2", "uint32": "<u4"}
    if name not in known:
        raise UserError(f"token dtype {name!r} is not known; known: {', '.join(known)}")
    return known[name]


def _size(store: Store, key: str) -> int:
    try:
        return store.size(key)
    except ObjectMissing:
        raise UserError(
            f"{store.url}/{key} does not exist; give a folder with {MANIFEST_KEY}, a .bin, or a Megatron prefix"
        ) from None


def _require_size(store: Store, key: str, expected: int) -> None:
    size = _size(store, key)
    if size != expected:
        raise UserError(f"{store.url}/{key}: {size:,} bytes, the manifest says {expected:,}; copy it again")
