"""The chat rows of one side of a domain, tokenized, in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from configs.errors import UserError
from configs.schema import Config
from tasks.data.chat.encoding import ChatEncoder, EncodedRow
from tasks.data.chat.messages import BadRow, Message, parse_row, row_key
from tasks.data.chat.reading import read_rows
from tasks.data.chat.template import BYTE_LEVEL_END, find_template
from tasks.data.corpus import Side, is_held_out
from tasks.data.rows import RowVocabulary, first_beyond
from tasks.data.vocabulary import TokenizerFile, Vocabulary, dtype_of, load_vocabulary

MAX_CHAT_BYTES = 1 << 30
"""Most text of one side, which every worker tokenizes when it starts and keeps in memory."""


@dataclass(frozen=True, kw_only=True)
class ChatRows:
    """Rows one after the other; row r has the tokens from ``starts[r]`` to ``starts[r + 1]``."""

    tokens: NDArray[np.unsignedinteger[Any]]
    """Token ids ``[T]``."""
    is_answer: NDArray[np.bool_]
    """Whether a token is one that the loss counts ``[T]``; of every row at least one is, and its first is not."""
    starts: NDArray[np.int64]
    """Borders of rows ``[R + 1]``."""
    vocabulary: RowVocabulary
    """What its ids mean."""
    digest: str
    """BLAKE3 over tokens and answers of the rows in order."""
    num_dropped: int
    """Rows left out because they are too long, as ``data.long_rows=drop`` asks."""
    num_truncated: int
    """Rows cut at their end, as ``data.long_rows=truncate`` asks."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row ``[R]``."""
        return np.diff(self.starts)

    def close(self) -> None:
        """Nothing is open."""


def chat_encoder(config: Config) -> tuple[ChatEncoder, Vocabulary]:
    """How conversations become tokens in a run, and the vocabulary they are of."""
    data = config.data
    vocabulary = load_vocabulary(data.tokenizer, data.end_of_document)
    return ChatEncoder(find_template(data, spelled_end(vocabulary)), vocabulary), vocabulary


def spelled_end(vocabulary: Vocabulary) -> str:
    """The end of document as a template writes it."""
    return vocabulary.name_of(vocabulary.end_of_document) if isinstance(vocabulary, TokenizerFile) else BYTE_LEVEL_END


def read_chat_rows(sources: tuple[str, ...], config: Config, side: Side, *, key: str) -> ChatRows:
    """Read, split and tokenize the rows of ``sources``; ``key`` names the sources in messages.

    Raises :class:`configs.errors.UserError` naming file and line for a row that is malformed, has no answer or is too
    long, and for ids beyond ``model.vocab_size``; and if no row is left on this side.
    """
    encoder, vocabulary = chat_encoder(config)
    cutter = _Cutter(config)
    encoded: list[EncodedRow] = []
    text_bytes = 0
    for place, messages in _rows_of_side(sources, config, side, key):
        text_bytes += sum(len(message.content.encode()) for message in messages)
        if text_bytes > MAX_CHAT_BYTES:
            raise UserError(
                f"{key} hold more than {MAX_CHAT_BYTES >> 20:,} MiB of text, which every worker would tokenize and keep in "
                "memory; give fewer rows"
            )
        try:
            row = encoder.encode(messages)
        except BadRow as problem:
            raise UserError(f"{place}: {problem}") from None
        if (row_in_length := cutter.fit(row, place)) is not None:
            encoded.append(row_in_length)
    if not encoded:
        raise UserError(
            f"{key} leave no {side.replace('_', '-')} row at data.held_out_fraction={config.data.held_out_fraction}"
            + (f", {cutter.num_dropped:,} being too long" if cutter.num_dropped else "")
            + "; give more rows or another fraction"
        )
    return _join(encoded, vocabulary, cutter)


def _rows_of_side(
    sources: tuple[str, ...], config: Config, side: Side, key: str
) -> Iterator[tuple[str, tuple[Message, ...]]]:
    """Place and conversation of the rows on ``side``; those of the other are parsed, too, so that no mistake is missed."""
    data = config.data
    for place, values in read_rows(sources, data, key):
        try:
            messages = parse_row(values)
            split_by = f"row/{row_key(messages)}" if data.split_field is None else _field(values, data.split_field)
        except BadRow as problem:
            raise UserError(f"{place}: {problem}") from None
        if is_held_out(split_by, data.held_out_fraction) == (side == "held_out"):
            yield place, messages


def _field(values: dict[str, Any], name: str) -> str:
    value = values.get(name)
    if value is None or isinstance(value, (dict, list, float)):
        fields = ", ".join(map(repr, list(values)[:10]))
        raise BadRow(f"data.split_field={name!r} needs text or a whole number there, got {value!r} (fields: {fields})")
    # Text as it is: a path below its source is then on the side that text files of that path are on.
    return value if isinstance(value, str) else json.dumps(value)


class _Cutter:
    """What ``data.long_rows`` says of rows that fit no sequence, and ids that fit no network."""

    def __init__(self, config: Config) -> None:
        self._policy, self._vocab_size = config.data.long_rows, config.model.vocab_size
        # S inputs and the token after the last of them.
        self._length, self._most = config.training.sequence_length, config.training.sequence_length + 1
        self.num_dropped = self.num_truncated = 0

    def fit(self, row: EncodedRow, place: str) -> EncodedRow | None:
        """The row as it is trained on, or None if it is left out."""
        if (wrong := first_beyond(row.tokens, self._vocab_size)) is not None:
            raise UserError(
                f"{place}: token id {row.tokens[wrong]} is not below model.vocab_size={self._vocab_size}; "
                "raise it to the size of the vocabulary"
            )
        if len(row.tokens) <= self._most:
            return row
        if self._policy == "drop":
            self.num_dropped += 1
            return None
        at = f"{place}: {len(row.tokens):,} tokens are more than training.sequence_length={self._length} and the one after"
        if self._policy == "refuse":
            raise UserError(
                f"{at}; raise training.sequence_length to {len(row.tokens) - 1:,}, or give data.long_rows=truncate (cut the "
                "end) or drop (leave such rows out)"
            )
        if not row.is_answer[: self._most].any():
            first = int(np.flatnonzero(row.is_answer)[0])
            raise UserError(
                f"{at}, and data.long_rows=truncate would leave nothing of its answer, which begins at token {first:,}; raise "
                "training.sequence_length, or give data.long_rows=drop"
            )
        self.num_truncated += 1
        return EncodedRow(tokens=row.tokens[: self._most], is_answer=row.is_answer[: self._most])


def _join(encoded: Sequence[EncodedRow], vocabulary: Vocabulary, cutter: _Cutter) -> ChatRows:
    tokens = np.concatenate([row.tokens for row in encoded]).astype(dtype_of(vocabulary.size))
    is_answer = np.concatenate([row.is_answer for row in encoded])
    starts = np.concatenate([[0], np.cumsum([len(row.tokens) for row in encoded])]).astype(np.int64)
    hasher = blake3(vocabulary.digest.encode())
    for array in (starts, tokens, is_answer):
        hasher.update(np.ascontiguousarray(array).tobytes())
    return ChatRows(
        tokens=tokens,
        is_answer=is_answer,
        starts=starts,
        vocabulary=RowVocabulary(
            size=vocabulary.size, end_of_document=vocabulary.end_of_document, digest=vocabulary.digest
        ),
        digest=str(hasher.hexdigest()),
        num_dropped=cutter.num_dropped,
        num_truncated=cutter.num_truncated,
    )
