"""State vectors of a few qubits, and the unitaries that act on neighbours among them.

Qubit 0 is the first index of a state: a state of n qubits is complex64 ``[2] * n`` or, flat, ``[2**n]``.

Legend: L unitaries; P Pauli strings but the identity, 4**w - 1 of w qubits; D = 2**w.
"""

from __future__ import annotations

import functools
import itertools
import math

import torch

PAULIS = torch.tensor(
    [[[1, 0], [0, 1]], [[0, 1], [1, 0]], [[0, -1j], [1j, 0]], [[1, 0], [0, -1]]], dtype=torch.complex64
)
"""I, X, Y, Z."""


@functools.cache
def pauli_strings(width: int) -> torch.Tensor:
    """All products of Pauli matrices on ``width`` qubits but the identity, complex64 ``[P, D, D]``, in order of I, X, Y, Z."""
    strings = [
        functools.reduce(torch.kron, [PAULIS[index] for index in indices])
        for indices in itertools.product(range(4), repeat=width)
    ]
    return torch.stack(strings[1:])


def unitaries_of(angles_LP: torch.Tensor) -> torch.Tensor:
    """exp(-i/2 sum_p angle_p * string_p), complex64 ``[L, D, D]``, from float32 ``[L, P]``: every unitary, up to a phase."""
    strings = pauli_strings(round(math.log(angles_LP.shape[-1] + 1, 4))).to(angles_LP.device)
    generators = angles_LP.to(torch.complex64) @ strings.flatten(1)
    return torch.matrix_exp(-0.5j * generators.reshape(-1, *strings.shape[1:]))


def zero_state(num_qubits: int) -> torch.Tensor:
    """|0...0>, complex64 ``[2] * num_qubits``."""
    state = torch.zeros(2**num_qubits, dtype=torch.complex64)
    state[0] = 1
    return state.reshape([2] * num_qubits)


def apply(unitary: torch.Tensor, state: torch.Tensor, first: int) -> torch.Tensor:
    """``unitary`` ``[D, D]`` on the qubits ``first`` to ``first + w`` of ``state``."""
    shape, width = state.shape, round(math.log2(len(unitary)))
    return (unitary @ state.reshape(2**first, 2**width, -1)).reshape(shape)


def split(state: torch.Tensor, num_first: int) -> torch.Tensor:
    """``state`` as a matrix M ``[2**num_first, rest]``: the first qubits are in the state M M^dagger."""
    return state.reshape(2**num_first, -1)


def overlap(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Tr(rho sigma) of rho = a a^dagger and sigma = b b^dagger, float32; for pure states (one column) their fidelity."""
    return (a.conj().T @ b).abs().square().sum()
