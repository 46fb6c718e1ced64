"""What the sources of a domain name: text files, or flat token files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.data_files import open_data_store
from cluster.errors import StorageError
from cluster.storage import list_text_files, scheme_of
from configs.data import DataConfig
from configs.errors import UserError
from tasks.data.package_files import is_python_source, python_files
from tasks.data.token_files import is_token_folder

_TOKEN_SUFFIXES = (".bin", ".idx")
_TEXT_SUFFIXES = (".txt", ".jsonl", ".ndjson", ".json", ".parquet", ".gz", ".zst")
"""Names that are asked about no further: each question is a request."""
_OTHER_SUFFIXES = (
    ".arrow", ".bz2", ".mds", ".npy", ".npz", ".pt", ".pth", ".safetensors", ".tar", ".tgz", ".xz", ".zip",
)  # fmt: skip
"""Files that are neither text nor token ids, and that a byte-level vocabulary would swallow without a word."""


@dataclass(frozen=True, kw_only=True)
class SourceFiles:
    """What sources name; one of the two is empty."""

    texts: tuple[tuple[str, str], ...]
    """Text files as (path below their source, URL), sorted."""
    tokens: tuple[str, ...]
    """URLs for :func:`tasks.data.token_files.find_token_files`, in the order given."""


def find_sources(sources: Sequence[str], data: DataConfig, key: str) -> SourceFiles:
    """Look up ``sources``; ``data.format`` and their names tell text from tokens, ``key`` is for messages.

    Raises :class:`configs.errors.UserError` for a source that holds no files, for text and token files in one domain,
    and for files that are known to be neither.
    """
    texts: list[tuple[str, str]] = []
    tokens: list[str] = []
    for source in sources:
        if data.format == "tokens" or (data.format == "auto" and _names_tokens(source)):
            tokens.append(source)
            continue
        found = list(python_files(source) if is_python_source(source) else _listed_files(source))
        if not found:
            raise UserError(f"data source {source!r} holds no files")
        flat = [url for _, url in found if url.endswith(_TOKEN_SUFFIXES)] if data.format == "auto" else []
        tokens += [url for url in flat if url.endswith(".bin")]
        texts += [item for item in found if item[1] not in flat]
    if texts and tokens:
        raise UserError(
            f"{key}={list(sources)} hold text ({texts[0][1]}) and token files ({tokens[0]}); name them apart, as two "
            "domains of data.mixture"
        )
    if data.format == "auto" and (other := [url for _, url in texts if url.endswith(_OTHER_SUFFIXES)]):
        raise UserError(f"{other[0]} is neither text nor a flat token file; known: txt, JSON lines, parquet, .bin")
    return SourceFiles(texts=tuple(sorted(texts)), tokens=tuple(tokens))


def _names_tokens(source: str) -> bool:
    if is_python_source(source):
        return False
    if source.endswith(_TOKEN_SUFFIXES):
        return True
    if source.endswith(_TEXT_SUFFIXES) or any(mark in source for mark in "*?["):
        return False
    return is_token_folder(source) or _is_prefix(source)


def _is_prefix(source: str) -> bool:
    """Whether ``source`` is what Megatron calls the two files ``source.bin`` and ``source.idx``."""
    try:
        store, name = open_data_store(f"{source.rstrip('/')}.bin")
        return store.exists(name)
    except StorageError:
        return False  # no such thing can be looked up; listing says what is wrong


def _listed_files(source: str) -> Iterator[tuple[str, str]]:
    base = source.rstrip("/")
    if any(mark in base for mark in "*?["):
        base = base.split("*")[0].split("?")[0].split("[")[0].rpartition("/")[0]
    if scheme_of(base) == "file":
        base = str(Path(base.removeprefix("file://")).absolute())
        source = str(Path(source.removeprefix("file://")).absolute())
    for url in list_text_files(source):
        yield url.removeprefix(base).lstrip("/") or url.rsplit("/", 1)[-1], url
