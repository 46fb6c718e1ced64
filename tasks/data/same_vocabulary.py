"""Whether a checkpoint was trained on the vocabulary that a run's data speak."""

from __future__ import annotations

from configs.data import DataConfig
from tasks.checkpoints.reader import Checkpoint
from tasks.data.token_manifest import TOKENIZER_KEY
from tasks.data.tokenizer_files import run_vocabulary
from tasks.data.vocabulary import token_names

SHOWN = 5
"""Tokens named in a difference."""


def vocabulary_misfits(data: DataConfig, checkpoint: Checkpoint) -> list[str]:
    """How the ids of ``data`` and those of the ``tokenizer.json`` beside ``checkpoint`` differ, a line each.

    Ids that only one of the two has are no difference: tokens may have been added. Nothing is said, and the list is empty,
    where the checkpoint holds no tokenizer (as after byte-level training) or nobody named that of the data.
    """
    theirs, ours = checkpoint.store.read_if_present(TOKENIZER_KEY), run_vocabulary(data)
    if theirs is None or ours is None:
        return []
    url = f"{checkpoint.store.url}/{TOKENIZER_KEY}"
    if not ours.source:
        return [f"the data are read as bytes, the checkpoint has a tokenizer; give data.tokenizer={url}"]
    mine, its = token_names(ours.source, data.tokenizer), token_names(theirs, url)
    different = [i for i in sorted(mine.keys() & its.keys()) if mine[i] != its[i]]
    if not different:
        return []
    shown = ", ".join(f"{i} is {mine[i]!r} in the data and {its[i]!r} in the checkpoint" for i in different[:SHOWN])
    return [f"{len(different):,} token ids mean something else: {shown}; give data.tokenizer={url}"]
