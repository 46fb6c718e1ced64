"""All that can be wrong with a run's data, found before any worker starts."""

from __future__ import annotations

import numpy as np

from configs.data import WHOLE
from configs.errors import UserError
from configs.schema import Config
from tasks.data.chat.stream import ChatStream
from tasks.data.domains import vocabulary_size
from tasks.data.held_out import require_held_out
from tasks.data.rows import TokenFileRow, find_id_beyond
from tasks.data.sequences import Stream
from tasks.data.stream import id_beyond, open_stream


def require_readable(config: Config) -> list[str]:
    """Open both sides of the data and check them against the model and the length of the run; notes for people.

    A note says of chat rows how many there are, and what of the sequences is padding.

    Token files are looked at in 32 stretches each where no manifest says how large their ids are; the others are
    checked as they are read. Raises :class:`configs.errors.UserError` for the first mistake found: missing or damaged
    files, no text, fewer tokens than a sequence, ids that do not fit ``model.vocab_size``, vocabularies that differ,
    packing without known borders, ``data.epochs`` too few for the run, too little for the held-out slices.
    """
    train = open_stream(config, "train", thorough=True)
    try:
        _require_ids(train)
        _require_epochs(train, config)
    finally:
        train.close()
    held_out = open_stream(config, "held_out")
    sides = {"training": train, "held out": held_out}
    try:
        require_held_out(held_out, config)
    finally:
        held_out.close()
    return [f"{name}: {stream.summary()}" for name, stream in sides.items() if isinstance(stream, ChatStream)]


def _require_ids(stream: Stream) -> None:
    size, limit = vocabulary_size(stream.domains), stream.vocab_size
    if size is not None and size > limit:
        raise UserError(
            f"model.vocab_size={limit} is too small: the vocabulary of the data has ids up to {size - 1}; "
            f"give model.vocab_size={size} or more"
        )
    for domain in stream.domains:
        row = domain.row
        if isinstance(row, TokenFileRow) and not row.has_manifest and (at := find_id_beyond(row, limit)) is not None:
            token = row.read_windows(np.array([at], dtype=np.int64), 1)
            raise id_beyond(row.place_of(at), int(token[0, 0]), limit)


def _require_epochs(stream: Stream, config: Config) -> None:
    epochs = config.data.epochs
    if epochs is None:
        return
    sequences = config.training.total_steps * config.training.batch_sequences
    for domain, windows, needed in zip(stream.domains, stream.windows, stream.mixture.counts(sequences), strict=True):
        if needed > epochs * windows:
            of = "" if domain.name == WHOLE else f" of the domain {domain.name!r}"
            raise UserError(
                f"training.total_tokens={config.training.total_tokens} reads {needed:,} sequences{of}, but "
                f"data.epochs={epochs} of {windows:,} are {epochs * windows:,}; give more data, more epochs (null for any "
                "number) or fewer tokens"
            )
