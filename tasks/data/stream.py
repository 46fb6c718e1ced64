"""The stream that training reads: which tokens stand at which position, whatever the number of workers.

Position n of the stream is one sequence of S tokens and the token after it: a window of one domain. Domain and window
are a pure function of (seed, n), so that a run continues anywhere, on any number of workers, without replaying anything
and without saved state: step k of batches of B sequences reads positions k B to (k + 1) B, and rank r of W reads the
r-th of W equal parts of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from configs.data import WHOLE
from configs.errors import UserError
from configs.schema import Config
from tasks.checkpoints.digest import fingerprint
from tasks.data.batch import Batch
from tasks.data.batches import num_windows, windows_at
from tasks.data.corpus import Side
from tasks.data.domains import Domain, open_domains
from tasks.data.mixture import Mixture
from tasks.data.packing import mask_targets, number_documents, number_positions
from tasks.data.rows import first_beyond
from tasks.data.skips import SkipRange, skip_to

_NAMES = {"train": "training", "held_out": "held-out"}


class TokenStream:
    """The sequences of one side, without end; safe to read from several threads."""

    def __init__(self, domains: Sequence[Domain], config: Config, side: Side) -> None:
        data = config.data
        self.domains = tuple(domains)
        self.sequence_length, self.vocab_size = config.training.sequence_length, config.model.vocab_size
        self.windows = tuple(num_windows(domain.row.num_tokens, self.sequence_length) for domain in domains)
        self.mixture = Mixture([domain.weight for domain in domains], seed=config.seed if data.shuffle else None)
        self._orders = [_order_of(domain, config.seed) if data.shuffle else None for domain in domains]
        # Domains agree on the token that ends a document.
        self._border = domains[0].row.vocabulary.end_of_document if data.packing == "documents" else None
        for domain, windows in zip(domains, self.windows, strict=True):
            if windows < 1:
                raise UserError(
                    f"{domain.key} hold {domain.row.num_tokens} {_NAMES[side]} tokens, fewer than one sequence "
                    f"(training.sequence_length={self.sequence_length}); give more text"
                )

    @property
    def num_windows(self) -> int:
        """Windows of all domains: sequences that differ. One domain reads them all once an epoch."""
        return sum(self.windows)

    @property
    def digest(self) -> str:
        """Identity of what is read: content, domains and their weights; not the order."""
        if len(self.domains) == 1:
            return self.domains[0].row.digest
        return fingerprint([[domain.name, domain.weight, domain.row.digest] for domain in self.domains])

    def read(self, first_sequence: int, count: int, skips: Sequence[SkipRange] = ()) -> Batch:
        """The run's sequences ``first_sequence`` to ``first_sequence + count``, in order; ``skips`` are jumped over.

        Raises :class:`configs.errors.UserError` naming file and byte for a token id beyond ``model.vocab_size``, and
        :class:`cluster.errors.StorageError` if storage fails.
        """
        sequences = np.arange(first_sequence, first_sequence + count, dtype=np.int64)
        assigned = self.mixture.assign(skip_to(sequences, skips))
        tokens_BS1 = np.empty((count, self.sequence_length + 1), dtype=np.int64)
        for number, order in enumerate(self._orders):
            chosen = assigned.domains == number
            if chosen.any():
                windows = windows_at(assigned.counters[chosen], self.windows[number], order=order)
                tokens_BS1[chosen] = self.read_windows(number, windows)
        return self.pack(tokens_BS1)

    def read_windows(self, number: int, windows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Token ids ``[len(windows), S + 1]`` of windows of the domain ``number``, checked against the vocabulary."""
        row, starts = self.domains[number].row, windows * self.sequence_length
        tokens_BS1 = row.read_windows(starts, self.sequence_length + 1)
        wrong = first_beyond(tokens_BS1, self.vocab_size)
        if wrong is not None:
            at, offset = divmod(wrong, self.sequence_length + 1)
            raise id_beyond(row.place_of(int(starts[at]) + offset), int(tokens_BS1[at, offset]), self.vocab_size)
        return tokens_BS1

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

    def close(self) -> None:
        """Give up open files and threads."""
        for domain in self.domains:
            domain.row.close()


def open_stream(config: Config, side: Side, *, thorough: bool = False) -> TokenStream:
    """Open the data of ``config`` on ``side``: text is read into memory, token files are read as they are asked for.

    ``thorough`` checks Megatron indices entry by entry, which the driver does once for all workers.
    Raises :class:`configs.errors.UserError` for data that is missing, damaged, empty or too little for one sequence.
    """
    return TokenStream(open_domains(config.data, side, thorough=thorough), config, side)


def id_beyond(place: str, token: int, vocab_size: int) -> UserError:
    """The error for a token that the model has no row for."""
    return UserError(
        f"{place}: token id {token} is not below model.vocab_size={vocab_size}; raise it to the size of the vocabulary, "
        "or say by data.token_dtype what integers the file holds"
    )


def _order_of(domain: Domain, seed: int) -> str:
    # Plain sources keep the order that runs without a mixture always had.
    return str(seed) if domain.name == WHOLE else f"{seed}/domain/{domain.name}"
