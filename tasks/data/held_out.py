"""Fixed held-out slices: the same sequences for every checkpoint of every run on a corpus."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from configs.schema import Config
from tasks.data.batches import num_windows, read_windows
from tasks.data.corpus import Corpus


def held_out_slices(corpus: Corpus, config: Config) -> list[NDArray[np.int64]]:
    """``evaluation.num_slices`` arrays of token ids ``[sequences, S + 1]``, disjoint, of the held-out side.

    Places are spread evenly over the held-out text; from each, neighbouring sequences go to the slices in
    turn. Raises :class:`configs.errors.UserError` if the text is too short.
    """
    length = config.training.sequence_length
    slices = config.evaluation.num_slices
    wanted = slices * (config.evaluation.slice_tokens // length)
    available = num_windows(len(corpus.tokens), length)
    if available < wanted:
        raise UserError(
            f"evaluation.num_slices={slices} of evaluation.slice_tokens={config.evaluation.slice_tokens} need "
            f"{wanted * length} held-out tokens; there are {available * length}. "
            "Lower evaluation.slice_tokens or raise data.held_out_fraction"
        )
    # Neighbours are of one file and alike in difficulty; dealing them to different slices matches the slices.
    places = (np.arange(wanted // slices, dtype=np.int64) * (available // slices)) // (wanted // slices)
    return [read_windows(corpus.tokens, places * slices + number, length) for number in range(slices)]
