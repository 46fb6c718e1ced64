"""The simulator beside dense matrices of numpy and scipy."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from examples.qssm.simulator import apply, overlap, pauli_strings, split, unitaries_of, zero_state
from examples.qssm.targets import ghz, random_mps, w

# Rounding of complex64 over a handful of matrix products.
TOLERANCE = 2e-6
PAULIS = {
    "I": np.eye(2), "X": np.array([[0, 1], [1, 0]]), "Y": np.array([[0, -1j], [1j, 0]]), "Z": np.diag([1, -1]),
}  # fmt: skip


def random_state(num_qubits: int, seed: int) -> torch.Tensor:
    state = torch.randn([2] * num_qubits, dtype=torch.complex64, generator=torch.Generator().manual_seed(seed))
    return state / state.norm()


def random_angles(width: int, seed: int) -> torch.Tensor:
    return torch.randn(4**width - 1, generator=torch.Generator().manual_seed(seed))


def dense(unitary: NDArray[np.complex128], first: int, num_qubits: int) -> NDArray[np.complex128]:
    """The matrix on all qubits of a unitary on some."""
    width = int(np.log2(len(unitary)))
    return np.kron(np.kron(np.eye(2**first), unitary), np.eye(2 ** (num_qubits - first - width)))


def schmidt_ranks(state: torch.Tensor) -> set[int]:
    return {
        int((np.linalg.svd(state.numpy().reshape(2**cut, -1), compute_uv=False) > 1e-5).sum())
        for cut in range(1, state.ndim)
    }


@pytest.mark.parametrize("width", [1, 2])
def test_pauli_strings_are_kronecker_products_in_order(width: int) -> None:
    names = ["".join(letters) for letters in itertools.product("IXYZ", repeat=width)][1:]
    expected = [functools.reduce(np.kron, [PAULIS[letter] for letter in name]) for name in names]
    np.testing.assert_array_equal(pauli_strings(width).numpy(), np.array(expected))


@given(width=st.integers(1, 3), seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=15)
def test_unitary_is_the_exponential_of_its_generator_and_unitary(width: int, seed: int) -> None:
    angles = random_angles(width, seed)
    generator = np.einsum("p,pij->ij", angles.double().numpy(), pauli_strings(width).numpy())
    found = unitaries_of(angles[None])[0].numpy()
    np.testing.assert_allclose(found, scipy.linalg.expm(-0.5j * generator), atol=10 * TOLERANCE)
    np.testing.assert_allclose(found.conj().T @ found, np.eye(2**width), atol=10 * TOLERANCE)


@given(num_qubits=st.integers(2, 5), first=st.integers(0, 3), seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=20)
def test_unitary_acts_on_its_qubits_as_the_dense_matrix_does(num_qubits: int, first: int, seed: int) -> None:
    first = min(first, num_qubits - 2)
    state, unitary = (
        random_state(num_qubits, seed),
        unitaries_of(torch.stack([random_angles(2, seed + 1), random_angles(2, seed)]))[1],
    )
    expected = dense(unitary.numpy().astype(np.complex128), first, num_qubits) @ state.numpy().reshape(-1)
    found = apply(unitary, state, first)
    np.testing.assert_allclose(found.numpy().reshape(-1), expected, atol=TOLERANCE)
    assert float(found.norm()) == pytest.approx(1, abs=1e-5)


def test_zero_state_has_all_its_weight_at_zero() -> None:
    np.testing.assert_array_equal(zero_state(3).numpy().reshape(-1), np.eye(8)[0])


@pytest.mark.parametrize("num_first", [1, 2, 3])
def test_overlap_of_parts_is_the_trace_of_reduced_density_matrices(num_first: int) -> None:
    a, b = random_state(3, 1), random_state(3, 2)
    rho, sigma = ((m := split(s, num_first).numpy()) @ m.conj().T for s in (a, b))
    assert float(overlap(split(a, num_first), split(b, num_first))) == pytest.approx(
        np.trace(rho @ sigma).real, abs=TOLERANCE
    )


def test_targets_are_normalised_and_of_schmidt_rank_two() -> None:
    for state in (ghz(5), w(5), random_mps(5, 0), random_mps(5, 7)):
        assert float(state.norm()) == pytest.approx(1, abs=1e-5)
        assert schmidt_ranks(state) == {2}


def test_targets_are_what_their_names_say() -> None:
    assert {index: round(float(x.real), 4) for index, x in enumerate(ghz(3).flatten()) if x} == {0: 0.7071, 7: 0.7071}
    assert {index for index, x in enumerate(w(3).flatten()) if x} == {1, 2, 4}
    assert not torch.equal(random_mps(4, 0), random_mps(4, 1))
    assert torch.equal(random_mps(4, 3), random_mps(4, 3))
