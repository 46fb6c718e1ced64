"""The sequential scattering circuit and its losses.

n qubits, all in |0>, pass L = n - b layers. Layer k (from 0) is one unitary on the qubits k to k + b: b bond qubits that the
layers before have touched, and one more. After it the first k + 1 qubits are in their last state, all n after the last layer.
Such a circuit reaches every state whose Schmidt rank is at most 2**b at every cut (Schoen et al., arXiv quant-ph/0501096).

Legend: L layers, P angles of a layer, A = L * P angles, B rows of a batch.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from examples.qssm.simulator import apply, overlap, split, unitaries_of, zero_state

ALL_LAYERS = -1
"""The stage in which all layers are trained at once."""


class ScatteringLayer(nn.Module):
    """One unitary by its angles, float32 ``[P]``."""

    def __init__(self, num_angles: int) -> None:
        super().__init__()
        # Of this size a two-qubit unitary is about as random as the Haar measure's: where barren plateaus are.
        self.angles = nn.Parameter(torch.randn(num_angles))


class ScatteringCircuit(nn.Module):
    """The circuit, beside the ``target`` state that it is to prepare: complex64 ``[2] * num_qubits``, known to the simulator alone."""

    target: torch.Tensor

    def __init__(self, target: torch.Tensor, bond: int) -> None:
        super().__init__()
        self.num_qubits, self.bond = target.ndim, bond
        self.layers = nn.ModuleList(ScatteringLayer(4 ** (bond + 1) - 1) for _ in range(self.num_qubits - bond))
        self.register_buffer("target", target, persistent=False)

    def forward(self, stage: int, noise_BA: torch.Tensor) -> torch.Tensor:
        """Loss of ``stage`` for each row, float32 ``[B]``, equal in value; gradients differ by ``noise_BA``.

        ``stage`` is the layer that is trained, those before it frozen and those after it left out, or :data:`ALL_LAYERS`.
        Row b's gradient is the exact one plus its noise in the angles that are trained.
        """
        trained = range(len(self.layers)) if stage == ALL_LAYERS else range(stage, stage + 1)
        angles_LP = [
            angles_P if number in trained else angles_P.detach()
            for number, angles_P in enumerate(self.angles_LP())
            if number <= trained[-1]
        ]
        state = self.prepare(angles_LP)
        loss = self.infidelity(state) if trained[-1] == len(self.layers) - 1 else self.distance(state, stage + 1)
        moving_A = torch.cat([angles_LP[number] for number in trained])
        width = angles_LP[0].numel()
        noise_BA = noise_BA[:, trained[0] * width : (trained[-1] + 1) * width]
        # Zero in value: the noise of a gradient that is measured, not computed.
        return loss + noise_BA @ (moving_A - moving_A.detach())

    def prepare(self, angles_LP: list[torch.Tensor]) -> torch.Tensor:
        """The state after layers with these angles, from the first on."""
        state = zero_state(self.num_qubits).to(angles_LP[0].device)
        for first, unitary in enumerate(unitaries_of(torch.stack(angles_LP)).unbind()):
            state = apply(unitary, state, first)
        return state

    def prepared(self) -> torch.Tensor:
        """The state after all layers."""
        return self.prepare(self.angles_LP())

    def angles_LP(self) -> list[torch.Tensor]:  # noqa: N802  its list has a shape
        """The angles of each layer."""
        return [cast(ScatteringLayer, layer).angles for layer in self.layers]

    def infidelity(self, state: torch.Tensor) -> torch.Tensor:
        """1 - |<target|state>|**2, float32."""
        return 1 - overlap(split(self.target, self.num_qubits), split(state, self.num_qubits))

    def distance(self, state: torch.Tensor, num_first: int) -> torch.Tensor:
        """Tr (rho - sigma)**2 of target and ``state`` on the first qubits, float32: 0 where they agree, at most 2."""
        rho, sigma = split(self.target, num_first), split(state, num_first)
        return overlap(rho, rho) + overlap(sigma, sigma) - 2 * overlap(rho, sigma)
