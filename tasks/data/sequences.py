"""Which sequence stands at which position of what training reads, whatever the number of workers.

Position n of the stream is one sequence of S inputs: a window of one domain. Domain and window are a pure function of
(seed, n), so that a run continues anywhere, on any number of workers, without replaying anything and without saved state:
step k of batches of B sequences reads positions k B to (k + 1) B, and rank r of W reads the r-th of W equal parts of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from configs.data import WHOLE
from configs.schema import Config
from tasks.checkpoints.digest import fingerprint
from tasks.data.batch import Batch, arrange
from tasks.data.batches import windows_at
from tasks.data.domains import Domain
from tasks.data.mixture import Mixture
from tasks.data.rows import Row
from tasks.data.skips import SkipRange, skip_to


class Stream(ABC):
    """The sequences of one side, without end; safe to read from several threads."""

    def __init__(self, domains: Sequence[Domain[Row]], windows: Sequence[int], config: Config) -> None:
        """``windows`` are the sequences that each of ``domains`` has an epoch, at least one."""
        data = config.data
        self.domains, self.windows = tuple(domains), tuple(windows)
        self.sequence_length, self.vocab_size = config.training.sequence_length, config.model.vocab_size
        self.mixture = Mixture([domain.weight for domain in domains], seed=config.seed if data.shuffle else None)
        self._orders = [order_of(domain.name, config.seed) if data.shuffle else None for domain in domains]

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
        places, parts = [], []
        for number, order in enumerate(self._orders):
            chosen = np.flatnonzero(assigned.domains == number)
            # Of no sequences, the first domain gives a batch of none.
            if len(chosen) or (count == 0 and number == 0):
                windows = windows_at(assigned.counters[chosen], self.windows[number], order=order)
                places.append(chosen)
                parts.append(self.read_batch(number, windows))
        return arrange(parts, np.concatenate(places))

    @abstractmethod
    def read_batch(self, number: int, windows: NDArray[np.int64]) -> Batch:
        """The sequences ``windows`` of the domain ``number``; raises as :meth:`read`."""

    @abstractmethod
    def replace_tokens(self, batch: Batch, tokens_BS1: NDArray[np.int64]) -> Batch:
        """What ``batch`` would have been with these tokens in it."""

    def close(self) -> None:
        """Give up open files and threads."""
        for domain in self.domains:
            domain.row.close()


def order_of(name: str, seed: int) -> str:
    """The key that the orders of the domain ``name`` are drawn by."""
    # Plain sources keep the order that runs without a mixture always had.
    return str(seed) if name == WHOLE else f"{seed}/domain/{name}"
