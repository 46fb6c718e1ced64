"""Which tokens a step sees: every window once an epoch, whatever the number of workers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from tasks.data.batches import num_windows, permute, windows_at

SIZES = [*range(1, 40), 63, 64, 65, 127, 128, 129, 255, 256, 257, 1000, 4095, 4096, 4097, 65_537]


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
def test_windows_at_each_epoch_visits_each_window_once(windows: int) -> None:
    order = windows_at(positions(3 * windows), windows, order="5").reshape(3, windows)
    for epoch in order:
        assert sorted(epoch.tolist()) == list(range(windows))


def test_windows_at_epochs_and_keys_have_their_own_orders() -> None:
    first = windows_at(positions(128), 64, order="5").reshape(2, 64)
    other = windows_at(positions(64), 64, order="6")
    assert first[0].tolist() != first[1].tolist()
    assert first[0].tolist() != other.tolist()


@pytest.mark.parametrize("cuts", [[0, 200], [0, 1, 2, 199, 200], [0, 63, 64, 65, 128, 200], list(range(201))])
def test_windows_at_any_cut_gives_the_same_sequence(cuts: list[int]) -> None:
    whole = windows_at(positions(200), 64, order="5")
    pieces = [windows_at(positions(200)[start:end], 64, order="5") for start, end in itertools.pairwise(cuts)]
    assert np.concatenate(pieces).tolist() == whole.tolist()


def test_windows_at_of_a_text_shorter_than_one_window_refused() -> None:
    with pytest.raises(UserError, match="fewer tokens than one training sequence"):
        windows_at(positions(2), 0, order="1")
