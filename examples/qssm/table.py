"""The fidelity table of docs/qssm.md: layer by layer against all at once, raw against merged, over seeds.

``python -m examples.qssm.table --qubits 10 --steps 1000 --shots 256`` trains the runs of an order side by side in this
process, without a cluster, and prints a row for each target and order. The mean of the last snapshots is
computed here; ``pma merge`` gives the same for a run.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from configs.load import load_config
from configs.schema import Config
from examples.qssm.network import ScatteringCircuit
from examples.qssm.workload import QSSM, stage_and_deviation
from tasks.training.schedule import step_learning_rate

ORDERS = (("end-to-end", 0.0), ("sequential", 0.0), ("sequential", 0.25))
ROW_SHOTS = 64


def configure(target: str, order: str, joint: float, seed: int, arguments: argparse.Namespace) -> Config:
    """The example's configuration for one cell of the table."""
    shots = arguments.shots
    return load_config(
        str(Path(__file__).parent / f"{target}.yaml"),
        (
            f"seed={seed}",
            f"workload.options.qubits={arguments.qubits}",
            f"workload.options.order={order}",
            f"workload.options.joint_fraction={joint}",
            f"training.sequence_length={ROW_SHOTS}",
            f"training.batch_tokens={shots}",
            f"training.total_tokens={arguments.steps * shots}",
            f"snapshots.interval_tokens={arguments.interval * shots}",
            f"schedule.warmup_tokens={10 * shots}",
            f"anneal.tokens={shots}",
            f"schedule.peak_learning_rate={arguments.learning_rate}",
        ),
    ).config


def fidelities(configs: Sequence[Config]) -> tuple[list[float], list[float]]:
    """Fidelities with the targets of the last snapshots, and of the mean of the last ``merge.count``, by run.

    The runs differ in seed and target alone and are trained side by side, as one with a dimension R of runs before all others.
    """
    first, workload = configs[0], QSSM()
    training, moments = first.training, first.optimizer
    circuits = [_drawn(workload, config) for config in configs]
    angles, targets = torch.func.stack_module_state(circuits)
    streams = [workload.batches(config, "train") for config in configs]
    optimizer = torch.optim.AdamW(angles.values(), betas=(moments.beta1, moments.beta2), weight_decay=0)
    snapshots: list[dict[str, torch.Tensor]] = []
    for step in range(training.total_steps):
        rows = [one.read(step * training.batch_sequences, training.batch_sequences) for one in streams]
        noise_RBA = torch.stack([one["noise"] for one in rows])
        stage, deviation = stage_and_deviation(first, step)
        optimizer.zero_grad()
        loss_R = _on_each(circuits[0], functools.partial(_mean_loss, stage), angles, targets, deviation * noise_RBA)
        torch.autograd.backward(loss_R.sum())
        _clip(angles, training.max_gradient_norm or math.inf)
        optimizer.param_groups[0]["lr"] = step_learning_rate(first, step + 1)
        optimizer.step()
        if (step + 1) * training.batch_tokens % first.snapshots.interval_tokens == 0:
            snapshots.append({name: tensor.detach().clone() for name, tensor in angles.items()})
    last = snapshots[-first.merge.count :]
    mean = {name: torch.stack([one[name] for one in last]).mean(0) for name in angles}
    with torch.no_grad():
        raw, merged = (
            1 - _on_each(circuits[0], lambda one, _: one.infidelity(one.prepared()), found, targets, noise_RBA)
            for found in (last[-1], mean)
        )
    return raw.tolist(), merged.tolist()


def _drawn(workload: QSSM, config: Config) -> ScatteringCircuit:
    torch.manual_seed(config.seed)
    circuit = workload.build(config)
    assert isinstance(circuit, ScatteringCircuit)
    return circuit


def _mean_loss(stage: int, circuit: ScatteringCircuit, noise_BA: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = circuit(stage, noise_BA).mean()
    return loss


def _on_each(
    circuit: ScatteringCircuit,
    function: Callable[[ScatteringCircuit, torch.Tensor], torch.Tensor],
    angles: dict[str, torch.Tensor],
    targets: dict[str, torch.Tensor],
    noise_RBA: torch.Tensor,
) -> torch.Tensor:
    """``function`` of the circuit of each run and its noise, ``[R]``."""
    called = _Called(circuit, function)

    def one(angles: dict[str, torch.Tensor], target: torch.Tensor, noise_BA: torch.Tensor) -> torch.Tensor:
        state = {f"circuit.{name}": tensor for name, tensor in angles.items()} | {"circuit.target": target}
        return torch.func.functional_call(called, state, (noise_BA,))  # type: ignore[no-any-return]

    return torch.vmap(one)(angles, targets["target"], noise_RBA)


class _Called(torch.nn.Module):
    """A circuit whose forward is a function of it."""

    def __init__(
        self, circuit: ScatteringCircuit, function: Callable[[ScatteringCircuit, torch.Tensor], torch.Tensor]
    ) -> None:
        super().__init__()
        self.circuit, self.function = circuit, function

    def forward(self, noise_BA: torch.Tensor) -> torch.Tensor:
        return self.function(self.circuit, noise_BA)


def _clip(angles: dict[str, torch.Tensor], limit: float) -> None:
    """Clip the gradient of each run by its own norm."""
    gradients = [tensor.grad for tensor in angles.values() if tensor.grad is not None]
    norm_R = torch.stack([gradient.square().sum(1) for gradient in gradients]).sum(0).sqrt()
    for gradient in gradients:
        gradient.mul_((limit / (norm_R + 1e-6)).clamp(max=1)[:, None])


def rows_of(order: str, joint: float, arguments: argparse.Namespace) -> Iterator[str]:
    """Lines of the table, in Markdown: one for each target."""
    cells = [(target, seed) for target in arguments.targets for seed in arguments.seeds]
    found = fidelities([configure(target, order, joint, seed, arguments) for target, seed in cells])
    name, count = f"{order}, joint end" if joint else order, len(arguments.seeds)
    for number, target in enumerate(arguments.targets):
        raw, merged = (values[number * count : (number + 1) * count] for values in found)
        yield f"| {target} | {name} | {_told(raw)} | {_told(merged)} |"


def _told(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.4f} ({', '.join(f'{value:.4f}' for value in values)})"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--qubits", type=int, default=8)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--shots", type=int, default=256, help="a step")
    parser.add_argument("--interval", type=int, default=10, help="steps between snapshots")
    parser.add_argument("--learning-rate", type=float, default=0.03)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--targets", nargs="+", default=["ghz", "w", "mps"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| target | order | last snapshot: mean (seeds) | mean of the last ten |\n|---|---|---|---|", flush=True)
    for order, joint in ORDERS:
        for line in rows_of(order, joint, arguments):
            print(line, flush=True)


if __name__ == "__main__":
    main()
