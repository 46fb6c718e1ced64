"""Small data sets for tests of the stream: text, flat token files, and configurations that read them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from configs.load import load_config
from configs.schema import Config

SEQUENCE_LENGTH = 16
BATCH_SEQUENCES = 8
END = 7
"""Token that ends documents of :func:`write_tokens`."""


def config_of(*overrides: str, vocab_size: int = 256) -> Config:
    """``tiny`` with short sequences, 8 a batch, and 8 sequences of held-out text."""
    batch = SEQUENCE_LENGTH * BATCH_SEQUENCES
    return load_config(
        "tiny",
        (
            f"training.sequence_length={SEQUENCE_LENGTH}", f"training.batch_tokens={batch}",
            f"training.total_tokens={50 * batch}", f"snapshots.interval_tokens={batch}", f"anneal.tokens={batch}",
            "schedule.warmup_tokens=0", "evaluation.num_slices=2", f"evaluation.slice_tokens={4 * SEQUENCE_LENGTH}",
            f"model.vocab_size={vocab_size}", "data.held_out_fraction=0.2", *overrides,
        ),
    ).config  # fmt: skip


def write_text(folder: Path, count: int = 40, word: str = "fox", repeats: int = 8) -> Path:
    """A folder of text files whose contents tell them apart."""
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number}.txt").write_text(f"the quick brown {word} {number} jumps over the lazy dog; " * repeats)
    return folder


def write_tokens(path: Path, documents: int = 60, *, top: int = 200, seed: int = 0, dtype: str = "<u2") -> np.ndarray:
    """A bare token file of documents of 5 to 40 ids above :data:`END`, each followed by it; returns its tokens."""
    generator = np.random.default_rng(seed)
    pieces = [[*generator.integers(END + 1, top, generator.integers(5, 40)).tolist(), END] for _ in range(documents)]
    tokens = np.array([token for piece in pieces for token in piece], dtype=dtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tokens.tobytes())
    return tokens


def windows_of(tokens: Sequence[int]) -> list[list[int]]:
    """All windows of S + 1 tokens, cut one by one."""
    count = (len(tokens) - 1) // SEQUENCE_LENGTH
    return [list(tokens[n * SEQUENCE_LENGTH : (n + 1) * SEQUENCE_LENGTH + 1]) for n in range(count)]
