"""The stream that training reads, opened: windows of text and token files, or chat rows packed into sequences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from configs.schema import Config
from tasks.data.batch import Batch
from tasks.data.batches import num_windows
from tasks.data.chat.stream import open_chat_stream
from tasks.data.corpus import Side
from tasks.data.domains import Domain, open_domains
from tasks.data.packing import mask_targets, number_documents, number_positions
from tasks.data.rows import TokenRow, first_beyond
from tasks.data.sequences import Stream

_NAMES = {"train": "training", "held_out": "held-out"}


class TokenStream(Stream):
    """Sequences of S tokens and the token after them, cut from long rows of tokens."""

    def __init__(self, domains: Sequence[Domain[TokenRow]], config: Config, side: Side) -> None:
        windows = [num_windows(domain.row.num_tokens, config.training.sequence_length) for domain in domains]
        super().__init__(domains, windows, config)
        self._rows = [domain.row for domain in domains]
        # Domains agree on the token that ends a document.
        self._border = domains[0].row.vocabulary.end_of_document if config.data.packing == "documents" else None
        for domain, count in zip(domains, windows, strict=True):
            if count < 1:
                raise UserError(
                    f"{domain.key} hold {domain.row.num_tokens} {_NAMES[side]} tokens, fewer than one sequence "
                    f"(training.sequence_length={self.sequence_length}); give more text"
                )

    def read_batch(self, number: int, windows: NDArray[np.int64]) -> Batch:
        """Windows of the domain ``number``, with document borders if ``data.packing`` asks for them."""
        return self.pack(self.read_windows(number, windows))

    def read_windows(self, number: int, windows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Token ids ``[len(windows), S + 1]`` of windows of the domain ``number``, checked against the vocabulary."""
        row, starts = self._rows[number], windows * self.sequence_length
        tokens_BS1 = row.read_windows(starts, self.sequence_length + 1)
        wrong = first_beyond(tokens_BS1, self.vocab_size)
        if wrong is not None:
            at, offset = divmod(wrong, self.sequence_length + 1)
            raise id_beyond(row.place_of(int(starts[at]) + offset), int(tokens_BS1[at, offset]), self.vocab_size)
        return tokens_BS1

    def replace_tokens(self, batch: Batch, tokens_BS1: NDArray[np.int64]) -> Batch:  # noqa: ARG002  borders are in the tokens
        """A batch of these tokens, with the borders that they hold."""
        return self.pack(tokens_BS1)

    def pack(self, tokens_BS1: NDArray[np.int64]) -> Batch:
        """A batch of these sequences, with document borders if ``data.packing`` asks for them."""
        if self._border is None:
            return Batch(tokens_BS1=tokens_BS1, targets_BS=tokens_BS1[:, 1:])
        documents_BS = number_documents(tokens_BS1, self._border)
        return Batch(
            tokens_BS1=tokens_BS1,
            targets_BS=mask_targets(tokens_BS1, self._border),
            document_ids_BS=documents_BS,
            position_ids_BS=number_positions(documents_BS),
        )


def open_stream(config: Config, side: Side, *, thorough: bool = False) -> Stream:
    """Open the data of ``config`` on ``side``: text and chat rows are read into memory, token files as they are asked for.

    ``thorough`` checks Megatron indices entry by entry, which the driver does once for all workers.
    Raises :class:`configs.errors.UserError` for data that is missing, damaged, empty or too little for one sequence.
    """
    if config.data.format == "chat":
        return open_chat_stream(config, side)
    return TokenStream(open_domains(config.data, side, thorough=thorough), config, side)


def id_beyond(place: str, token: int, vocab_size: int) -> UserError:
    """The error for a token that the model has no row for."""
    return UserError(
        f"{place}: token id {token} is not below model.vocab_size={vocab_size}; raise it to the size of the vocabulary, "
        "or say by data.token_dtype what integers the file holds"
    )
