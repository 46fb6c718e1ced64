"""Held-out slices: fixed, disjoint, spread over the text."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from configs.data import WHOLE
from configs.errors import UserError
from configs.schema import Config
from configs.sections import EvaluationConfig
from configs.training import TrainingConfig
from tasks.data.corpus import Corpus
from tasks.data.domains import Domain
from tasks.data.held_out import held_out_batches
from tasks.data.rows import RowVocabulary, TextRow
from tasks.data.stream import TokenStream

SEQUENCE_LENGTH = 16


def config_of(num_slices: int, sequences_each: int, **training: int) -> Config:
    return Config(
        name="x",
        training=TrainingConfig(
            **{"sequence_length": SEQUENCE_LENGTH, "batch_tokens": 2048, "total_tokens": 8_192_000, **training}
        ),
        evaluation=EvaluationConfig(num_slices=num_slices, slice_tokens=sequences_each * SEQUENCE_LENGTH),
    )


def corpus_of(num_windows: int) -> Corpus:
    """A corpus whose windows can be told apart: window i begins with i as two bytes."""
    tokens = np.zeros(num_windows * SEQUENCE_LENGTH + 1, dtype=np.uint8)
    numbers = np.arange(num_windows)
    tokens[:-1:SEQUENCE_LENGTH], tokens[1::SEQUENCE_LENGTH] = numbers // 256, numbers % 256
    return Corpus(tokens=tokens, num_files=1, digest="")


def slices_of(corpus: Corpus, config: Config) -> list[np.ndarray]:
    """Token ids ``[sequences, S + 1]`` of each slice of a held-out side that is ``corpus``."""
    row = TextRow(corpus, RowVocabulary(size=256, end_of_document=None, digest=None))
    stream = TokenStream([Domain(name=WHOLE, weight=1.0, row=row)], config, "held_out")
    return [each[WHOLE].tokens_BS1 for each in held_out_batches(stream, config)]


def window_numbers(rows: np.ndarray) -> list[int]:
    return (rows[:, 0] * 256 + rows[:, 1]).tolist()


@pytest.mark.parametrize(
    ("windows", "num_slices", "sequences_each"), [(12, 3, 4), (13, 3, 4), (1000, 3, 4), (999, 4, 100), (5, 1, 5)]
)
def test_held_out_slices_are_disjoint_and_of_the_asked_size(windows: int, num_slices: int, sequences_each: int) -> None:
    slices = slices_of(corpus_of(windows), config_of(num_slices, sequences_each))
    assert [rows.shape for rows in slices] == [(sequences_each, SEQUENCE_LENGTH + 1)] * num_slices
    numbers = [number for rows in slices for number in window_numbers(rows)]
    assert len(set(numbers)) == num_slices * sequences_each
    assert max(numbers) < windows


def test_held_out_slices_rows_are_text_with_its_next_token() -> None:
    corpus = corpus_of(50)
    for rows in slices_of(corpus, config_of(2, 5)):
        for number, row in zip(window_numbers(rows), rows, strict=True):
            start = number * SEQUENCE_LENGTH
            assert row.tolist() == corpus.tokens[start : start + SEQUENCE_LENGTH + 1].tolist()


def test_held_out_slices_spread_over_the_text_and_alike() -> None:
    slices = slices_of(corpus_of(1000), config_of(2, 10))
    for rows in slices:
        numbers = window_numbers(rows)
        assert set(np.diff(numbers)) == {100}
        assert min(numbers) < 100
        assert max(numbers) >= 900
    # Slice by slice the sequences are neighbours, so that slices are alike in difficulty.
    assert [b - a for a, b in zip(*map(window_numbers, slices), strict=True)] == [1] * 10


def test_held_out_slices_do_not_depend_on_seed_or_workers() -> None:
    config = config_of(3, 4)
    moved = dataclasses.replace(config, seed=99, training=dataclasses.replace(config.training, num_workers=4))
    for first, second in zip(slices_of(corpus_of(99), config), slices_of(corpus_of(99), moved), strict=True):
        assert np.array_equal(first, second)


@pytest.mark.parametrize("windows", [1, 11])
def test_held_out_slices_too_little_text_refused_with_numbers(windows: int) -> None:
    with pytest.raises(UserError, match=f"need 192 held-out tokens; there are {windows * 16}") as caught:
        slices_of(corpus_of(windows), config_of(3, 4))
    assert "Lower evaluation.slice_tokens or raise data.held_out_fraction" in str(caught.value)
