"""Chat rows as a stream of sequences: several rows to a sequence, kept apart, with targets on answers alone.

Legend: B batch, S sequence, S1 sequence and the token after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from configs.data import WHOLE
from configs.schema import Config
from tasks.data.batch import Batch
from tasks.data.chat.bins import Bins, pack_best_fit, pack_in_order
from tasks.data.chat.rows import ChatRows, read_chat_rows
from tasks.data.corpus import Side
from tasks.data.domains import Domain, sources_key
from tasks.data.packing import IGNORED_TARGET, number_positions
from tasks.data.sequences import Stream, order_of


class ChatStream(Stream):
    """Sequences of whole rows; what is left of one is filled with ends of documents, which count for nothing.

    Rows are packed once, the same for every epoch; epochs differ in the order of sequences.
    """

    def __init__(self, domains: Sequence[Domain[ChatRows]], config: Config, side: Side) -> None:
        shuffled = config.data.shuffle and side == "train"
        self._rows = [domain.row for domain in domains]
        self._bins = [_pack(domain, config, shuffled=shuffled) for domain in domains]
        super().__init__(domains, [bins.num_bins for bins in self._bins], config)

    def read_batch(self, number: int, windows: NDArray[np.int64]) -> Batch:
        """Sequences of rows of the domain ``number``."""
        rows, bins, length = self._rows[number], self._bins[number], self.sequence_length
        end = rows.vocabulary.end_of_document
        assert end is not None, "a vocabulary that encodes knows it"
        tokens_BS1 = np.full((len(windows), length + 1), end, dtype=np.int64)
        is_answer_BS1 = np.zeros(tokens_BS1.shape, dtype=bool)
        documents_BS1 = np.zeros(tokens_BS1.shape, dtype=np.int64)
        for place, window in enumerate(windows.tolist()):
            begin = 0
            for document, row in enumerate(bins.rows_of(window).tolist()):
                first, last = rows.starts[row], rows.starts[row + 1]
                stop = begin + int(last - first)
                tokens_BS1[place, begin:stop] = rows.tokens[first:last]
                is_answer_BS1[place, begin:stop] = rows.is_answer[first:last]
                # What fills the sequence is one document more.
                documents_BS1[place, stop:] = document + 1
                begin = stop
        documents_BS = documents_BS1[:, :-1]
        return Batch(
            tokens_BS1=tokens_BS1,
            targets_BS=np.where(is_answer_BS1[:, 1:], tokens_BS1[:, 1:], IGNORED_TARGET),
            document_ids_BS=documents_BS,
            position_ids_BS=number_positions(documents_BS),
        )

    def replace_tokens(self, batch: Batch, tokens_BS1: NDArray[np.int64]) -> Batch:
        """The same rows and answers, of other tokens."""
        targets_BS = np.where(batch.targets_BS == IGNORED_TARGET, IGNORED_TARGET, tokens_BS1[:, 1:])
        return replace(batch, tokens_BS1=tokens_BS1, targets_BS=targets_BS)

    def summary(self) -> str:
        """Rows, tokens and padding, in one line for people."""
        rows = sum(len(row.lengths) for row in self._rows)
        tokens = sum(len(row.tokens) for row in self._rows)
        answers = sum(int(row.is_answer.sum()) for row in self._rows)
        cells = self.num_windows * (self.sequence_length + 1)
        parts = [
            f"{rows:,} chat rows in {self.num_windows:,} sequences of {self.sequence_length:,}",
            f"{answers / tokens:.1%} of their {tokens:,} tokens are answers",
            f"{1 - tokens / cells:.1%} padding",
        ]
        for name, count in (
            ("left out as too long", sum(row.num_dropped for row in self._rows)),
            ("cut at the end", sum(row.num_truncated for row in self._rows)),
        ):
            if count:
                parts.append(f"{count:,} rows {name}")
        return "; ".join(parts)


def open_chat_stream(config: Config, side: Side) -> ChatStream:
    """Read the chat rows of every domain; raises as :func:`tasks.data.chat.rows.read_chat_rows`."""
    data = config.data
    asked = [(domain.name, domain.sources, domain.weight) for domain in data.mixture] or [(WHOLE, data.sources, 1.0)]
    domains = [
        Domain(name=name, weight=weight, row=read_chat_rows(sources, config, side, key=sources_key(name)))
        for name, sources, weight in asked
    ]
    return ChatStream(domains, config, side)


def _pack(domain: Domain[ChatRows], config: Config, *, shuffled: bool) -> Bins:
    """Sequences of a domain; as the rows lie for evaluation, so that held-out slices depend on no seed."""
    lengths, capacity = domain.row.lengths, config.training.sequence_length + 1
    if not shuffled:
        return pack_in_order(lengths, capacity)
    return pack_best_fit(lengths, capacity, key=f"{order_of(domain.name, config.seed)}/pack")
