"""Which tokens a step sees: every window once an epoch, whatever the number of workers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.data.batches import num_windows, permute, rank_batch, read_windows, window_indices

SIZES = [*range(1, 40), 63, 64, 65, 127, 128, 129, 255, 256, 257, 1000, 4095, 4096, 4097, 65_537]
TOKENS = np.random.default_rng(3).integers(0, 256, size=16 * 37 + 5, dtype=np.uint8)
SEQUENCE_LENGTH = 16


def positions(size: int) -> np.ndarray:
    return np.arange(size, dtype=np.int64)


# The permutation


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("key", ["1/0", "1/1"])
def test_permute_is_a_bijection(size: int, key: str) -> None:
    assert np.array_equal(np.sort(permute(positions(size), size, key)), positions(size))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(size=st.integers(1, 3000), key=st.text(max_size=8))
def test_permute_any_size_and_key_is_a_bijection(size: int, key: str) -> None:
    assert np.array_equal(np.sort(permute(positions(size), size, key)), positions(size))


def test_permute_each_index_alone_gives_the_same() -> None:
    whole = permute(positions(300), 300, "key")
    alone = [int(permute(np.array([i], dtype=np.int64), 300, "key")[0]) for i in range(300)]
    assert whole.tolist() == alone


def test_permute_leaves_its_argument_alone() -> None:
    given_positions = positions(50)
    permute(given_positions, 50, "key")
    assert np.array_equal(given_positions, positions(50))


def test_permute_other_keys_give_other_orders() -> None:
    orders = {tuple(permute(positions(100), 100, f"{seed}/0").tolist()) for seed in range(20)}
    assert len(orders) == 20


def test_permute_known_value_never_changes() -> None:
    # A run that resumes under another order would see some windows twice and others never.
    assert permute(positions(10), 10, "1/0").tolist() == [4, 5, 3, 2, 8, 0, 1, 7, 6, 9]


def test_permute_spreads_neighbours() -> None:
    # For a random order of n windows the mean distance of neighbours is n / 3; an order that keeps runs of the
    # corpus together is far below. n / 4 is 30 standard errors below n / 3 for n = 10,000.
    size = 10_000
    distances = np.abs(np.diff(permute(positions(size), size, "key")))
    assert distances.mean() > size / 4


# Windows and epochs


@pytest.mark.parametrize(("tokens", "expected"), [(0, 0), (1, 0), (16, 0), (17, 1), (32, 1), (33, 2)])
def test_num_windows_needs_one_token_more_for_the_last_target(tokens: int, expected: int) -> None:
    assert num_windows(tokens, 16) == expected


@pytest.mark.parametrize("windows", [1, 7, 64])
def test_window_indices_each_epoch_visits_each_window_once(windows: int) -> None:
    order = window_indices(seed=5, first_sequence=0, count=3 * windows, windows=windows).reshape(3, windows)
    for epoch in order:
        assert sorted(epoch.tolist()) == list(range(windows))


def test_window_indices_epochs_and_seeds_have_their_own_orders() -> None:
    first = window_indices(seed=5, first_sequence=0, count=128, windows=64).reshape(2, 64)
    other = window_indices(seed=6, first_sequence=0, count=64, windows=64)
    assert first[0].tolist() != first[1].tolist()
    assert first[0].tolist() != other.tolist()


@pytest.mark.parametrize("cuts", [[0, 200], [0, 1, 2, 199, 200], [0, 63, 64, 65, 128, 200], list(range(201))])
def test_window_indices_any_cut_gives_the_same_sequence(cuts: list[int]) -> None:
    whole = window_indices(seed=5, first_sequence=0, count=200, windows=64)
    pieces = [
        window_indices(seed=5, first_sequence=start, count=end - start, windows=64)
        for start, end in itertools.pairwise(cuts)
    ]
    assert np.concatenate(pieces).tolist() == whole.tolist()


def test_read_windows_targets_are_inputs_shifted_by_one() -> None:
    windows = read_windows(TOKENS, np.array([2, 0]), SEQUENCE_LENGTH)
    assert windows.dtype == np.int64
    assert windows[0].tolist() == TOKENS[32:49].tolist()
    assert windows[1].tolist() == TOKENS[0:17].tolist()


# Batches


def batch(step: int, rank: int, world_size: int, seed: int = 1) -> np.ndarray:
    return rank_batch(
        TOKENS,
        seed=seed,
        step=step,
        batch_sequences=8,
        sequence_length=SEQUENCE_LENGTH,
        rank=rank,
        world_size=world_size,
    )


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("step", [0, 1, 4, 1000])
def test_rank_batch_ranks_together_are_the_single_rank_batch(step: int, world_size: int) -> None:
    parts = [batch(step, rank, world_size) for rank in range(world_size)]
    assert {part.shape for part in parts} == {(8 // world_size, SEQUENCE_LENGTH + 1)}
    assert np.array_equal(np.concatenate(parts), batch(step, 0, 1))


def test_rank_batch_an_epoch_of_steps_reads_every_window_once() -> None:
    windows = num_windows(len(TOKENS), SEQUENCE_LENGTH)
    assert windows == 37
    # 37 steps of 8 sequences are 8 epochs of 37 windows.
    rows = np.concatenate([batch(step, 0, 1) for step in range(37)])
    counts: dict[bytes, int] = {}
    for row in rows:
        counts[row.tobytes()] = counts.get(row.tobytes(), 0) + 1
    expected = read_windows(TOKENS, np.arange(37), SEQUENCE_LENGTH)
    assert counts == {row.tobytes(): 8 for row in expected}


def test_rank_batch_steps_and_seeds_differ() -> None:
    batches = [batch(0, 0, 1), batch(1, 0, 1), batch(0, 0, 1, seed=2)]
    assert len({item.tobytes() for item in batches}) == 3


def test_rank_batch_text_shorter_than_one_window_refused() -> None:
    with pytest.raises(ValueError, match="token"):
        rank_batch(
            TOKENS[:SEQUENCE_LENGTH],
            seed=1,
            step=0,
            batch_sequences=2,
            sequence_length=SEQUENCE_LENGTH,
            rank=0,
            world_size=1,
        )
