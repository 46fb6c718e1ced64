"""What a step reads.

B batch, S sequence, S1 sequence and the token after it.
"""

# ruff: noqa: N802, N815  fields carry shape suffixes, as tensors do

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Sequences in the order of the stream; all arrays are int64."""

    tokens_BS1: NDArray[np.int64]
    """Token ids: S inputs and the token after them."""
    targets_BS: NDArray[np.int64]
    """What each input is to be followed by; -100 counts for nothing (after the end of a document, if packed)."""
    document_ids_BS: NDArray[np.int64] | None = None
    """Number of the document of each input, from 0 in each sequence; None unless ``data.packing=documents``."""
    position_ids_BS: NDArray[np.int64] | None = None
    """Position of each input within its document; None unless ``data.packing=documents``."""

    @property
    def inputs_BS(self) -> NDArray[np.int64]:
        """Input token ids."""
        return self.tokens_BS1[:, :-1]

    @property
    def weight(self) -> float | None:
        """Targets that count; None where all do, as many in each sequence."""
        return None if self.document_ids_BS is None else float((self.targets_BS >= 0).sum())

    def __len__(self) -> int:
        return len(self.tokens_BS1)

    def rows(self, start: int, end: int) -> Batch:
        """Sequences ``start`` (included) to ``end`` (excluded), such as a micro-batch."""
        documents, positions = self.document_ids_BS, self.position_ids_BS
        return replace(
            self,
            tokens_BS1=self.tokens_BS1[start:end],
            targets_BS=self.targets_BS[start:end],
            document_ids_BS=None if documents is None else documents[start:end],
            position_ids_BS=None if positions is None else positions[start:end],
        )


def arrange(parts: Sequence[Batch], places: NDArray[np.int64]) -> Batch:
    """One batch of all sequences of ``parts``, of which the n-th, counted through them, stands at ``places[n]``."""
    if len(parts) == 1:
        return parts[0]
    order = np.argsort(places)
    documents = [part.document_ids_BS for part in parts if part.document_ids_BS is not None]
    positions = [part.position_ids_BS for part in parts if part.position_ids_BS is not None]
    return Batch(
        tokens_BS1=np.concatenate([part.tokens_BS1 for part in parts])[order],
        targets_BS=np.concatenate([part.targets_BS for part in parts])[order],
        document_ids_BS=np.concatenate(documents)[order] if documents else None,
        position_ids_BS=np.concatenate(positions)[order] if positions else None,
    )
