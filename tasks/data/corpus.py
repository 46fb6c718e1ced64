"""Read a corpus of text files and split it into training and held-out files.

The split is a hash of each file's path below its source, so it is the same on every machine, for
every seed and in every order of listing.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from cluster.storage import list_text_files, scheme_of
from cluster.storage_fsspec import read_file
from configs.data import DataConfig
from configs.errors import UserError

STDLIB_SOURCE = "python://stdlib"
_NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib2to3"}
DOCUMENT_END = 0
"""Byte that ends every document; it does not occur in text."""
MAX_CORPUS_BYTES = 4 << 30


Side = Literal["train", "held_out"]


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """One side of a corpus as a flat array, documents separated by :data:`DOCUMENT_END`."""

    tokens: NDArray[np.uint8]
    """Token ids."""
    num_files: int
    """Files on this side."""
    digest: str
    """BLAKE3 over the sorted (relative path, content digest) of its files."""


def read_corpus(data: DataConfig, side: Side) -> Corpus:
    """Read the files of ``data.sources`` that are on ``side`` of the split.

    Raises :class:`configs.errors.UserError` for a source that is empty, missing or unreadable, and if no text
    is left on this side.
    """
    listed = sorted(_files(data.sources))
    files = [item for item in listed if is_held_out(item[0], data.held_out_fraction) == (side == "held_out")]
    tokens, hasher = bytearray(), blake3()
    for relative, url in files:
        text = read_file(url)
        if len(tokens) + len(text) > MAX_CORPUS_BYTES:
            raise UserError(
                f"data.sources hold more than {MAX_CORPUS_BYTES >> 30} GiB of text, which is kept in memory"
            )
        hasher.update(f"{relative}\0{blake3(text).hexdigest()}\n".encode())
        tokens += text
        tokens.append(DOCUMENT_END)
    if len(tokens) <= len(files):
        raise UserError(
            f"data.sources={list(data.sources)} leave no {side.replace('_', '-')} text: {len(files)} of "
            f"{len(listed)} files at data.held_out_fraction={data.held_out_fraction}; give more files or another fraction"
        )
    return Corpus(
        tokens=np.frombuffer(bytes(tokens), dtype=np.uint8), num_files=len(files), digest=str(hasher.hexdigest())
    )


def is_held_out(relative_path: str, fraction: float) -> bool:
    """Whether the file is on the held-out side: a uniform hash of its path, below ``fraction``."""
    value = int.from_bytes(blake3(f"held-out/{relative_path}".encode()).digest(8), "big")
    return value / 2**64 < fraction


def _files(sources: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for source in sources:
        found = list(_stdlib_files() if source == STDLIB_SOURCE else _listed_files(source))
        if not found:
            raise UserError(f"data source {source!r} holds no files")
        yield from found


def _listed_files(source: str) -> Iterator[tuple[str, str]]:
    base = source.rstrip("/")
    if any(mark in base for mark in "*?["):
        base = base.split("*")[0].split("?")[0].split("[")[0].rpartition("/")[0]
    if scheme_of(base) == "file":
        base = str(Path(base.removeprefix("file://")).absolute())
        source = str(Path(source.removeprefix("file://")).absolute())
    for url in list_text_files(source):
        yield url.removeprefix(base).lstrip("/") or url.rsplit("/", 1)[-1], url


def _stdlib_files() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if not _NOT_LIBRARY & set(relative.parts) and not relative.parts[0].startswith("config-"):
            yield relative.as_posix(), str(path)
