"""The fidelity table of docs/qssm.md: layer by layer against all at once, raw against merged, over seeds.

``python -m examples.qssm.table --qubits 10 --steps 1000 --shots 256`` trains in this process by the workload's own functions,
without a cluster, and prints a row for each target and order as its seeds are done. The mean of the last snapshots is
computed here; ``pma merge`` gives the same for a run.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

from configs.load import load_config
from configs.schema import Config
from examples.qssm.workload import QSSM
from tasks.training.schedule import step_learning_rate
from tasks.workload import ForwardPass

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


def fidelities(config: Config) -> tuple[float, float]:
    """Fidelity with the target of the last snapshot and of the mean of the last ``merge.count``."""
    workload, training = QSSM(), config.training
    torch.manual_seed(config.seed)
    circuit = workload.build(config)
    batches, measure = workload.batches(config, "train"), workload.evaluate(config)
    moments = config.optimizer
    optimizer = torch.optim.AdamW(circuit.parameters(), betas=(moments.beta1, moments.beta2), weight_decay=0)
    snapshots: list[list[torch.Tensor]] = []
    for step in range(training.total_steps):
        this = ForwardPass(
            config=config, step=step, micro_batches=1, world_size=1, weight=None, device=torch.device("cpu")
        )
        rows = batches.read(step * training.batch_sequences, training.batch_sequences)
        optimizer.zero_grad()
        torch.autograd.backward(workload.loss(circuit, rows, this))
        torch.nn.utils.clip_grad_norm_(circuit.parameters(), training.max_gradient_norm or float("inf"))
        optimizer.param_groups[0]["lr"] = step_learning_rate(config, step + 1)
        optimizer.step()
        if (step + 1) * training.batch_tokens % config.snapshots.interval_tokens == 0:
            snapshots.append([parameter.detach().clone() for parameter in circuit.parameters()])
    with torch.no_grad():
        raw = 1 - measure(circuit)[0]["all"][0]
        for number, parameter in enumerate(circuit.parameters()):
            parameter.copy_(torch.stack([one[number] for one in snapshots[-config.merge.count :]]).mean(0))
        return raw, 1 - measure(circuit)[0]["all"][0]


def row_of(target: str, order: str, joint: float, arguments: argparse.Namespace) -> str:
    """One line of the table, in Markdown."""
    found = [fidelities(configure(target, order, joint, seed, arguments)) for seed in arguments.seeds]
    name = f"{order}, joint end" if joint else order
    raw, merged = ([one[index] for one in found] for index in range(2))
    return f"| {target} | {name} | {_told(raw)} | {_told(merged)} |"


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
    for target in arguments.targets:
        for order, joint in ORDERS:
            print(row_of(target, order, joint, arguments), flush=True)


if __name__ == "__main__":
    main()
