"""Text of a domain in memory, as tokens, split into a training and a held-out side.

A text file is on one side by a hash of its path below its source, a document of JSON lines or parquet by a hash of its
text: the same on every machine, for every seed and in every order of listing, and equal documents are on one side.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from cluster.data_files import DataFile
from cluster.storage_fsspec import read_file
from configs.data import DataConfig
from configs.errors import UserError
from tasks.checkpoints.digest import fingerprint
from tasks.data.documents import (
    COMPRESSED_SUFFIXES,
    Document,
    DocumentOptions,
    format_of,
    read_documents,
    whole,
)
from tasks.data.vocabulary import BYTE_LEVEL, ByteLevel, Vocabulary, dtype_of

DOCUMENT_END = ByteLevel.end_of_document
"""Byte that ends every document; it does not occur in text."""
MAX_CORPUS_BYTES = 4 << 30
"""Most byte-level text of one side that is kept in memory."""
MAX_TOKENIZED_BYTES = 64 << 20
"""Most text that every worker tokenizes when it starts; at some MB a second this is half a minute."""


Side = Literal["train", "held_out"]


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """One side of a domain's text as a flat array, every document followed by its end."""

    tokens: NDArray[np.unsignedinteger[Any]]
    """Token ids."""
    num_files: int
    """Files with something on this side."""
    digest: str
    """BLAKE3 over the sorted (relative path, digest of what is on this side) of its files, and of the tokenizer if there is one."""


def read_text(
    files: Sequence[tuple[str, str]], vocabulary: Vocabulary, data: DataConfig, side: Side, *, key: str
) -> Corpus:
    """Tokens of what of ``files``, as (relative path, URL), is on ``side``; ``key`` names the sources in messages.

    Raises :class:`configs.errors.UserError` for a file that cannot be read, for more text than memory or patience
    holds, and if no text is left on this side.
    """
    tokens, hasher = bytearray(), blake3()
    num_files = text_bytes = 0
    for relative, url in files:
        with_lengths = not is_one_document(url, data)
        file_hasher, is_on_side = blake3(), False
        for text, ids in _documents(relative, url, vocabulary, data, side):
            text_bytes, is_on_side = text_bytes + len(text), True
            _require_little(text_bytes, vocabulary, key)
            file_hasher.update(len(text).to_bytes(8, "big") + text if with_lengths else text)
            tokens += ids
        if is_on_side:
            num_files += 1
            hasher.update(f"{relative}\0{file_hasher.hexdigest()}\n".encode())
    if not text_bytes:
        raise UserError(
            f"{key} leave no {side.replace('_', '-')} text: {num_files} of {len(files)} files at "
            f"data.held_out_fraction={data.held_out_fraction}; give more files or another fraction"
        )
    digest = str(hasher.hexdigest())
    if vocabulary.kind != BYTE_LEVEL:
        digest = fingerprint({"text": digest, "tokenizer": vocabulary.digest})
    flat = np.frombuffer(bytes(tokens), dtype=dtype_of(vocabulary.size))
    return Corpus(tokens=flat, num_files=num_files, digest=digest)


def is_one_document(url: str, data: DataConfig) -> bool:
    """Whether the file is a document as a whole, and so on one side as a whole."""
    return format_of(url, _options(data)) == "txt"


def is_held_out(relative_path: str, fraction: float) -> bool:
    """Whether the file is on the held-out side: a uniform hash of its path, below ``fraction``."""
    value = int.from_bytes(blake3(f"held-out/{relative_path}".encode()).digest(8), "big")
    return value / 2**64 < fraction


def _documents(
    relative: str, url: str, vocabulary: Vocabulary, data: DataConfig, side: Side
) -> Iterator[tuple[bytes, bytes]]:
    """Text and token ids, as bytes, of the documents of a file that are on ``side``."""
    wanted, fraction = side == "held_out", data.held_out_fraction
    whole_file = is_one_document(url, data)
    if whole_file and is_held_out(relative, fraction) != wanted:
        return
    if whole_file and vocabulary.kind == BYTE_LEVEL and not url.endswith(COMPRESSED_SUFFIXES):
        # As it is, whatever its encoding: bytes need none.
        text = read_file(url)
        yield text, text + bytes([DOCUMENT_END])
        return
    # Its size is not known here; reading goes to the end in any case.
    file = DataFile(url=url, bytes=sys.maxsize, version="")
    for record in read_documents(whole(file), _options(data)):
        if not isinstance(record, Document):
            continue
        text = record.text.encode()
        if not whole_file and is_held_out(f"document/{blake3(text).hexdigest()}", fraction) != wanted:
            continue
        if problem := vocabulary.problem_of(record.text):
            raise UserError(f"{record.place}: {problem}; mend it")
        yield text, vocabulary.encode(record.text).tobytes()


def _options(data: DataConfig) -> DocumentOptions:
    kind = data.format
    return DocumentOptions(format="auto" if kind == "tokens" or kind == "chat" else kind, text_field=data.text_field)  # noqa: PLR1714


def _require_little(text_bytes: int, vocabulary: Vocabulary, key: str) -> None:
    limit, cause = MAX_CORPUS_BYTES, "which is kept in memory"
    if vocabulary.kind != BYTE_LEVEL:
        limit, cause = MAX_TOKENIZED_BYTES, "which every worker would tokenize again when it starts"
    if text_bytes > limit:
        raise UserError(
            f"{key} hold more than {limit >> 20:,} MiB of text, {cause}; turn it into token files once, with "
            "pma tokenize SOURCES --output URL, and give that URL as the source"
        )
