"""Tied weights: one tensor under two names, of which only one belongs on disk."""

from __future__ import annotations

import dataclasses
import json

from tasks.checkpoints.reader import Checkpoint, open_checkpoint
from tasks.checkpoints.regions import TensorPlace
from tasks.checkpoints.safetensors_header import DTYPE_BYTES, CheckpointError
from tasks.checkpoints.tensor_reader import TensorReader

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
READ_BYTES = 8 << 20


def open_untied(url: str) -> Checkpoint:
    """:func:`tasks.checkpoints.reader.open_checkpoint` and :func:`without_tied`: what merges and their proofs see."""
    return without_tied(open_checkpoint(url))


def without_tied(checkpoint: Checkpoint) -> Checkpoint:
    """``checkpoint`` without the head that ``config.json`` calls tied to the embedding and that equals it in every bit.

    transformers writes tied weights once; other trainers write both. Reads the two tensors if both are there. Raises
    :class:`CheckpointError` if they are called tied and differ: averaging or dropping one would lose something.
    """
    if HEAD not in checkpoint.model or EMBEDDING not in checkpoint.model or not _says_tied(checkpoint):
        return checkpoint
    if not _equal(checkpoint, checkpoint.model[HEAD], checkpoint.model[EMBEDDING]):
        raise CheckpointError(
            f"{checkpoint.url}: config.json says tie_word_embeddings, but {HEAD!r} and {EMBEDDING!r} differ; "
            "set it to false if they were trained apart"
        )
    model = {name: place for name, place in checkpoint.model.items() if name != HEAD}
    return dataclasses.replace(checkpoint, model=model)


def _says_tied(checkpoint: Checkpoint) -> bool:
    data = checkpoint.store.read_if_present("config.json")
    try:
        values = json.loads(data or b"{}")
    except ValueError:
        return False
    return isinstance(values, dict) and values.get("tie_word_embeddings") is True


def _equal(checkpoint: Checkpoint, a: TensorPlace, b: TensorPlace) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    width = DTYPE_BYTES[a.dtype]
    step = READ_BYTES // width
    with TensorReader(checkpoint.store) as reader:
        for start in range(0, a.num_elements, step):
            end = min(start + step, a.num_elements)
            pieces = [memoryview(bytearray((end - start) * width)) for _ in range(2)]
            for place, piece in zip((a, b), pieces, strict=True):
                reader.read_into(place, start, end, piece)
            if pieces[0] != pieces[1]:
                return False
    return True
