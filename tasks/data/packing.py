"""Document borders within training sequences: ids, positions and targets that respect them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

IGNORED_TARGET = -100
"""Target that counts for nothing: what ``torch.nn.functional.cross_entropy`` ignores by default."""


def number_documents(tokens_BS1: NDArray[np.int64], end_of_document: int) -> NDArray[np.int64]:
    """Number of the document, from 0 in each sequence, that each input token is of: ``[B, S]``.

    The token that ends a document belongs to it; the next token begins another.
    """
    ends_BS = tokens_BS1[:, :-1] == end_of_document
    documents_BS: NDArray[np.int64] = np.cumsum(ends_BS, axis=1, dtype=np.int64) - ends_BS
    return documents_BS


def number_positions(document_ids_BS: NDArray[np.int64]) -> NDArray[np.int64]:
    """Position of each input token within its document: ``[B, S]``, from 0 at each border and at the sequence's begin."""
    places_S = np.arange(document_ids_BS.shape[1], dtype=np.int64)
    begins_BS = np.diff(document_ids_BS, axis=1, prepend=-1) != 0
    return places_S - np.maximum.accumulate(np.where(begins_BS, places_S, 0), axis=1)


def mask_targets(tokens_BS1: NDArray[np.int64], end_of_document: int) -> NDArray[np.int64]:
    """Targets ``[B, S]``: the next token, but :data:`IGNORED_TARGET` after the end of a document.

    What follows there is the first token of another document, which nothing within the document foretells.
    """
    targets_BS: NDArray[np.int64] = np.where(tokens_BS1[:, :-1] == end_of_document, IGNORED_TARGET, tokens_BS1[:, 1:])
    return targets_BS
