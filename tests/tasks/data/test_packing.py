"""Document borders inside sequences, against a walk token by token."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.model import ModelConfig
from tasks.data.packing import IGNORED_TARGET, mask_targets, number_documents, number_positions
from tasks.models.build import build_model

END = 9


def walk(row: list[int]) -> tuple[list[int], list[int], list[int]]:
    """Documents, positions and targets of one sequence, by the book."""
    documents, positions, targets = [], [], []
    document = position = 0
    for token, following in itertools.pairwise(row):
        documents.append(document)
        positions.append(position)
        targets.append(IGNORED_TARGET if token == END else following)
        position += 1
        if token == END:
            document, position = document + 1, 0
    return documents, positions, targets


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(
    rows=st.integers(1, 20).flatmap(
        lambda n: st.lists(
            st.lists(st.sampled_from([1, 2, END]), min_size=n + 1, max_size=n + 1), min_size=1, max_size=4
        )
    )
)
def test_packing_is_what_a_walk_finds(rows: list[list[int]]) -> None:
    tokens_BS1 = np.array(rows, dtype=np.int64)
    documents_BS = number_documents(tokens_BS1, END)
    expected = [walk(row) for row in rows]
    assert documents_BS.tolist() == [documents for documents, _, _ in expected]
    assert number_positions(documents_BS).tolist() == [positions for _, positions, _ in expected]
    assert mask_targets(tokens_BS1, END).tolist() == [targets for _, _, targets in expected]


def test_packing_gives_int64() -> None:
    tokens_BS1 = np.array([[1, END, 2, 3]], dtype=np.int64)
    documents_BS = number_documents(tokens_BS1, END)
    for array in (documents_BS, number_positions(documents_BS), mask_targets(tokens_BS1, END)):
        assert array.dtype == np.int64


def test_ignored_target_is_what_cross_entropy_ignores() -> None:
    logits_BV = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    targets_B = torch.tensor([1, IGNORED_TARGET, 2])
    losses_B = torch.nn.functional.cross_entropy(logits_BV, targets_B, reduction="none")
    assert losses_B[1] == 0
    assert losses_B[0] > 0


# Documents of one, two and several tokens, one of them cut at either edge.
LENGTHS = [(3, 1, 4, 2, 6), (16,), (1, 1, 1, 13), (15, 1)]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("family", ["qwen3_moe", "llama"])
def test_transformers_keeps_documents_apart_by_their_positions_alone(family: str, lengths: tuple[int, ...]) -> None:
    model = ModelConfig(
        family=family, vocab_size=32, hidden_size=32, num_experts=4 if family == "qwen3_moe" else 0,
        expert_intermediate_size=32, intermediate_size=32, head_size=8, experts_implementation="eager",
    )  # fmt: skip
    network = build_model(model, 16, seed=1).eval()
    inputs_S = torch.randint(1, 32, (sum(lengths),), generator=torch.Generator().manual_seed(2))
    positions_BS = torch.cat([torch.arange(length) for length in lengths])[None]
    with torch.inference_mode():
        together_SV = network(input_ids=inputs_S[None], position_ids=positions_BS, use_cache=False).logits[0]
        start = 0
        for length in lengths:
            alone_SV = network(input_ids=inputs_S[None, start : start + length], use_cache=False).logits[0]
            # float32 sums over more masked keys.
            assert torch.allclose(together_SV[start : start + length], alone_SV, atol=1e-5)
            start += length
