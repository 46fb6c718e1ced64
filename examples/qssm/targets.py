"""Quantum states of small Schmidt rank to be learned; complex64 ``[2] * num_qubits``, of norm 1."""

from __future__ import annotations

import torch


def ghz(num_qubits: int) -> torch.Tensor:
    """(|0...0> + |1...1>) / sqrt 2; Schmidt rank 2 at every cut."""
    flat = torch.zeros(2**num_qubits, dtype=torch.complex64)
    flat[0] = flat[-1] = 0.5**0.5
    return flat.reshape([2] * num_qubits)


def w(num_qubits: int) -> torch.Tensor:
    """The even superposition of all states with one qubit at 1; Schmidt rank 2 at every cut."""
    flat = torch.zeros(2**num_qubits, dtype=torch.complex64)
    flat[[2**place for place in range(num_qubits)]] = num_qubits**-0.5
    return flat.reshape([2] * num_qubits)


def random_mps(num_qubits: int, seed: int) -> torch.Tensor:
    """A random matrix product state of bond dimension 2: Gaussian tensors, contracted and normalised; Schmidt rank up to 2."""
    generator = torch.Generator().manual_seed(seed)
    state = torch.randn(1, 2, dtype=torch.complex128, generator=generator)
    for _ in range(num_qubits):
        tensor = torch.randn(2, 2, 2, dtype=torch.complex128, generator=generator)
        state = torch.einsum("xl,lpr->xpr", state, tensor).reshape(-1, 2)
        state = state / state.norm()
    flat: torch.Tensor = state @ torch.randn(2, dtype=torch.complex128, generator=generator)
    normalised: torch.Tensor = flat / flat.norm()
    return normalised.to(torch.complex64).reshape([2] * num_qubits)
