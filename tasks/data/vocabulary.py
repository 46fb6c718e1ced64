"""Text to token ids: byte-level, or a Hugging Face ``tokenizers`` file.

Every document is followed by the end-of-document token. Text never turns into special tokens: a document that
spells ``<|endoftext|>`` is encoded as the letters that it holds.
"""

from __future__ import annotations

import json
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from cluster.data_files import open_data
from configs.errors import UserError
from tasks.checkpoints.digest import digest_bytes, fingerprint

BYTE_LEVEL = "bytes"
"""The name under which users ask for the byte-level vocabulary."""
BYTE_LEVEL_SIZE = 256
USUAL_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")
"""Names that end-of-document tokens go by; one is taken if the vocabulary has no other of them."""
MAX_TOKENIZER_BYTES = 1 << 28

Ids = NDArray[np.unsignedinteger[Any]]


class Vocabulary(Protocol):
    """Encodes documents; one of :class:`ByteLevel` and :class:`TokenizerFile`."""

    kind: str
    """``bytes`` or ``tokenizers``."""
    size: int
    """Largest token id plus one."""
    end_of_document: int
    """Token id after every document."""
    digest: str
    """Of all that determines the ids."""
    source: bytes
    """The tokenizer file; empty for byte-level."""

    def problem_of(self, text: str) -> str | None:
        """Why ``text`` cannot be encoded, or None."""

    def encode(self, text: str) -> Ids:
        """Token ids of a document and its end, as :func:`dtype_of` says."""

    def count_bytes(self, ids: NDArray[np.int64]) -> int:
        """Bytes of UTF-8 that the ids ``[n]`` stand for, as bits per byte count them."""


def load_vocabulary(tokenizer: str, end_of_document: str | int | None = None) -> Vocabulary:
    """Byte-level for ``bytes``; else the ``tokenizer.json`` that the path or URL names, or its folder holds.

    ``end_of_document`` is a token's name or id; without one the vocabulary must have exactly one of the usual
    names. Raises :class:`configs.errors.UserError`.
    """
    if tokenizer == BYTE_LEVEL:
        return build_vocabulary(b"", end_of_document, BYTE_LEVEL)
    url = tokenizer_url(tokenizer)
    with open_data(url) as file:
        data = file.read(MAX_TOKENIZER_BYTES + 1)
    if len(data) > MAX_TOKENIZER_BYTES:
        raise UserError(f"{url!r} is larger than {MAX_TOKENIZER_BYTES >> 20} MiB; is it a tokenizer.json?")
    return build_vocabulary(data, end_of_document, url)


def tokenizer_url(tokenizer: str) -> str:
    """The file that a path or URL means: itself, or ``tokenizer.json`` in the folder."""
    return tokenizer if tokenizer.endswith(".json") else f"{tokenizer.rstrip('/')}/tokenizer.json"


def build_vocabulary(data: bytes, end_of_document: str | int | None, name: str) -> Vocabulary:
    """The vocabulary of the tokenizer file ``data``, or byte-level if it is empty; ``name`` is for messages."""
    if not data and name == BYTE_LEVEL:
        if end_of_document not in (None, 0, "0"):
            raise UserError(f"byte-level documents end with token 0, not {end_of_document!r}; leave it out")
        return ByteLevel()
    return TokenizerFile(data, end_of_document, name)


def dtype_of(vocabulary_size: int) -> np.dtype[Any]:
    """Smallest little-endian unsigned type that holds ids below ``vocabulary_size``."""
    for name in ("uint8", "uint16", "uint32"):
        if vocabulary_size <= np.iinfo(name).max + 1:
            return np.dtype(name).newbyteorder("<")
    raise UserError(f"a vocabulary of {vocabulary_size:,} tokens does not fit 32 bits")


class ByteLevel:
    """One token a byte of UTF-8; 0, which no text holds, ends a document."""

    kind = BYTE_LEVEL
    size = BYTE_LEVEL_SIZE
    end_of_document = 0
    digest = fingerprint({"kind": BYTE_LEVEL, "end_of_document": 0})
    source = b""

    def problem_of(self, text: str) -> str | None:
        """A zero byte would end the document early."""
        return "it holds a zero byte, which ends a document here" if "\0" in text else None

    def encode(self, text: str) -> Ids:
        """The bytes of ``text``, then 0."""
        return np.frombuffer(text.encode() + b"\0", dtype=np.uint8)

    def count_bytes(self, ids: NDArray[np.int64]) -> int:
        """A byte a token, the ends of documents too."""
        return len(ids)


class TokenizerFile:
    """A ``tokenizer.json`` of Hugging Face ``tokenizers``; its truncation, padding and added ends are switched off."""

    kind = "tokenizers"

    def __init__(self, data: bytes, end_of_document: str | int | None, name: str) -> None:
        self.source = data
        self._tokenizer = _parse_tokenizer(data, name)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        # Ids may have gaps, so that their number says too little.
        self.size = max(vocabulary.values(), default=-1) + 1
        self.end_of_document = _end_of(vocabulary, end_of_document, name)
        self.digest = fingerprint(
            {"kind": self.kind, "file": digest_bytes(data), "end_of_document": self.end_of_document}
        )
        added = self._tokenizer.get_added_tokens_decoder()
        self._no_text = [self.end_of_document, *(number for number, token in added.items() if token.special)]
        self._dtype = dtype_of(self.size)

    def problem_of(self, text: str) -> str | None:  # noqa: ARG002  any text can be encoded
        """Nothing stands against any text."""
        return None

    def encode(self, text: str) -> Ids:
        """Token ids of ``text``, then the end."""
        # A batch of one uses one thread, and the fast variant spares the offsets that nobody reads.
        ids = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        ids.append(self.end_of_document)
        return np.array(ids, dtype=self._dtype)

    def count_bytes(self, ids: NDArray[np.int64]) -> int:
        """Bytes of the decoded text, without special tokens, which are no text; a character cut at an edge counts as three."""
        kept = ids[~np.isin(ids, self._no_text)]
        return len(self._tokenizer.decode(kept.tolist(), skip_special_tokens=False).encode())

    def name_of(self, token: int) -> str:
        """How the file spells the token of this id."""
        name = self._tokenizer.id_to_token(token)
        assert name is not None, f"id {token} is not of this vocabulary"
        return name


def _parse_tokenizer(data: bytes, name: str) -> Tokenizer:
    try:
        text = data.decode()
        json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name!r} is no tokenizer.json: {error}") from None
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # noqa: BLE001  tokenizers raises nothing narrower for a file that it does not know
        raise UserError(f"{name!r} cannot be read by the tokenizers library: {error}") from None


def _end_of(vocabulary: dict[str, int], wanted: str | int | None, name: str) -> int:
    if wanted is None:
        usual = [token for token in USUAL_ENDS if token in vocabulary]
        if len(usual) == 1:
            return vocabulary[usual[0]]
        raise UserError(
            f"{name!r}: which token ends a document? It has {', '.join(map(repr, usual)) or 'none of the usual names'}; "
            "name the token or give its id"
        )
    # Digits are an id: byte-level vocabularies have every digit as a token, which ends no document.
    if isinstance(wanted, int) or wanted.isdecimal():
        if int(wanted) in vocabulary.values():
            return int(wanted)
    elif wanted in vocabulary:
        return vocabulary[wanted]
    raise UserError(f"{name!r} has no token {wanted!r} to end documents with; give a token of it, or an id")


def token_names(data: bytes, name: str) -> dict[int, str]:
    """Id to spelling of every token of the tokenizer file ``data``, added ones included; ``name`` is for messages."""
    return {
        token: spelling for spelling, token in _parse_tokenizer(data, name).get_vocab(with_added_tokens=True).items()
    }
