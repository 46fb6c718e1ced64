"""What a run on one plain text reads, worked out the short way: the oracle of the stream and of held-out slices."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.data import DataConfig
from configs.schema import Config
from tasks.data.batches import num_windows, windows_at
from tasks.data.corpus import Corpus, Side, read_text
from tasks.data.held_out import slice_places
from tasks.data.sources import find_sources
from tasks.data.vocabulary import ByteLevel


def read_corpus(data: DataConfig, side: Side) -> Corpus:
    """The text of ``data.sources`` that is on ``side``, byte by byte."""
    texts = find_sources(data.sources, data, "data.sources").texts
    return read_text(texts, ByteLevel(), data, side, key="data.sources")


def read_windows(
    tokens: NDArray[np.unsignedinteger[Any]], windows: NDArray[np.int64], sequence_length: int
) -> NDArray[np.int64]:
    """Token ids ``[len(windows), S + 1]``: S inputs and, shifted by one, S targets."""
    offsets = windows[:, None] * sequence_length + np.arange(sequence_length + 1)[None, :]
    windows_BS: NDArray[np.int64] = tokens[offsets].astype(np.int64)
    return windows_BS


def rank_batch(corpus: Corpus, config: Config, *, step: int, rank: int, world_size: int) -> NDArray[np.int64]:
    """Rank ``rank``'s rows of the global batch of step ``step`` (counted from 0)."""
    training = config.training
    share = training.batch_sequences // world_size
    first = step * training.batch_sequences + rank * share
    windows = windows_at(
        np.arange(first, first + share, dtype=np.int64),
        num_windows(len(corpus.tokens), training.sequence_length),
        order=str(config.seed),
    )
    return read_windows(corpus.tokens, windows, training.sequence_length)


def held_out_slices(config: Config) -> list[NDArray[np.int64]]:
    """``evaluation.num_slices`` arrays of token ids ``[sequences, S + 1]``, disjoint, of the held-out side."""
    tokens, length = read_corpus(config.data, "held_out").tokens, config.training.sequence_length
    wanted = config.evaluation.slice_tokens // length
    places = slice_places(num_windows(len(tokens), length), wanted, config.evaluation.num_slices)
    return [read_windows(tokens, windows, length) for windows in places]
