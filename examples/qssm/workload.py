"""The quantum sequential scattering model as a workload of the pipelines (docs/qssm.md).

A *token* is a shot: one run of each circuit that a gradient needs. ``training.batch_tokens`` are the shots of a step, a row of
a batch ``training.sequence_length`` of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from configs.errors import UserError
from configs.schema import Config
from configs.typed import parse_record
from examples.qssm.network import ALL_LAYERS, ScatteringCircuit
from examples.qssm.targets import ghz, random_mps, w
from tasks.workload import DrawnRows, ForwardPass, Measure, NamedRows, Rows, Side

INFIDELITY_VARIANCE, DISTANCE_VARIANCE = 1.0, 5.0
"""Most variance of a loss measured with one shot: of F, a swap test's, and of Tr sigma**2 - 2 Tr rho sigma, 1 + 2**2."""


@dataclass(frozen=True, kw_only=True)
class QssmOptions:
    """``workload.options``."""

    target: Literal["ghz", "w", "mps"]
    """State to be learned."""
    qubits: int = 8
    """Of the target."""
    bond: int = 1
    """Qubits b that carry entanglement from layer to layer: Schmidt ranks up to 2**b."""
    order: Literal["sequential", "end-to-end"] = "sequential"
    """Train layer after layer, or all at once from the start: the conventional way."""
    joint_fraction: float = 0.0
    """Share of the steps, the last ones, in which a sequential run trains all layers at once."""
    target_seed: int = 0
    """Which random matrix product state."""
    exact: bool = False
    """Whether gradients are computed, as if of endless shots."""

    def __post_init__(self) -> None:
        if not 2 <= self.qubits <= 14 or not 1 <= self.bond < self.qubits or not 0 <= self.joint_fraction < 1:
            raise TypeError(
                f"qubits={self.qubits} (2 to 14), bond={self.bond} (1 to qubits - 1) or joint_fraction="
                f"{self.joint_fraction} (0 to below 1) is not possible"
            )

    def build_target(self) -> torch.Tensor:
        """The state, complex64 ``[2] * qubits``."""
        builders: Mapping[str, Callable[[int], torch.Tensor]] = {
            "ghz": ghz,
            "w": w,
            "mps": lambda qubits: random_mps(qubits, self.target_seed),
        }
        return builders[self.target](self.qubits)

    def stage_at(self, step: int, total_steps: int) -> int:
        """The layer that is trained after ``step`` steps: each for as many steps, in order."""
        sequential_steps = round(total_steps * (1 - self.joint_fraction))
        if self.order == "end-to-end" or step >= sequential_steps:
            return ALL_LAYERS
        return step * (self.qubits - self.bond) // sequential_steps


class QSSM:
    """Build, batches, loss and evaluate of the model."""

    def build(self, config: Config) -> nn.Module:
        """The circuit with random angles."""
        options = options_of(config)
        return ScatteringCircuit(options.build_target(), options.bond)

    def batches(self, config: Config, side: Side) -> DrawnRows:
        """Noise of measured gradients: a row for each ``training.sequence_length`` shots, standard normal ``[A]``."""
        options = options_of(config)
        num_angles = (options.qubits - options.bond) * (4 ** (options.bond + 1) - 1)

        def rows_at(positions: NDArray[np.int64]) -> dict[str, torch.Tensor]:
            rows = [_generator(config.seed, side, int(position)).standard_normal(num_angles) for position in positions]
            return {"noise": torch.from_numpy(np.array(rows, dtype=np.float32).reshape(len(positions), num_angles))}

        return DrawnRows(rows_at, digest=f"shots/{config.seed}/{num_angles}")

    def loss(self, network: nn.Module, batch: Rows, this: ForwardPass) -> torch.Tensor:
        """Loss of the layer in training, its gradient as measured by the parameter-shift rule with finitely many shots.

        A swap test gives +1 or -1, with variance at most 1; a shifted pair of circuits, S shots each, gives a gradient with
        a variance of at most 1/(2 S) times that of the loss. That bound is the noise here, as a Gaussian.
        """
        assert isinstance(batch, NamedRows)
        stage, deviation = stage_and_deviation(this.config, this.step)
        return this.mean(network(stage, deviation * batch["noise"].to(this.device)))

    def evaluate(self, config: Config) -> Measure:
        """The infidelity of the whole circuit, which a simulator knows exactly: all slices are equal."""

        def measure(network: nn.Module) -> list[dict[str, tuple[float, int]]]:
            circuit = cast(ScatteringCircuit, network)
            infidelity = circuit.infidelity(circuit.prepared()).item()
            return [{"all": (infidelity, 1)}] * config.evaluation.num_slices

        return measure


def options_of(config: Config) -> QssmOptions:
    """``workload.options`` of ``config``; raises :class:`configs.errors.UserError` for what is not possible."""
    try:
        return parse_record(QssmOptions, config.workload.options)
    except TypeError as error:
        raise UserError(f"workload.options={config.workload.options!r}: {error}") from error


def stage_and_deviation(config: Config, step: int) -> tuple[int, float]:
    """What is trained after ``step`` steps, and the standard deviation of a row's gradient in each angle."""
    options = options_of(config)
    stage = options.stage_at(step, config.training.total_steps)
    is_whole = stage in (ALL_LAYERS, options.qubits - options.bond - 1)
    variance = INFIDELITY_VARIANCE if is_whole else DISTANCE_VARIANCE
    return stage, 0.0 if options.exact else math.sqrt(variance / (2 * config.training.sequence_length))


def _generator(seed: int, side: Side, position: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed + 2**32 * (side == "held_out"), position]))
