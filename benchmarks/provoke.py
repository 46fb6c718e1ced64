"""Loss spikes made on purpose: named settings, trained in one process, and what the detector says to them.

``python -m benchmarks.provoke --list``, or ``python -m benchmarks.provoke NAME... [--seeds 3] [--first-seed 1]
[--steps K] [--curves FOLDER] [--set key=value ...]``

Each setting is ``configs/tiny.yaml`` with overrides, so ``pma pretrain --config tiny`` with the same ones is the same
experiment on a gang. The loop is the worker's in plain torch: same network, data, optimizer, schedule, guard and
drill, one process, no snapshots. A line of JSON a run.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from configs.load import load_config
from configs.schema import Config
from pipelines.study.faults import SETTINGS, SHORT, Setting, write_sums
from tasks.data.stream import TokenStream, open_stream
from tasks.models.build import build_model
from tasks.models.routers import watch_routers
from tasks.recovery.detector import find_spike
from tasks.recovery.policy import rule_of
from tasks.recovery.rule import Point
from tasks.training.drill import corrupt, is_corruption_due, poison
from tasks.training.router_health import balance_loss
from tasks.training.schedule import step_learning_rate
from tasks.training.step_guard import build_guard


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a run measured."""

    points: tuple[Point, ...]
    """Every step."""
    num_refused: int
    """Updates that the guard refused."""
    num_clipped: int
    """Updates that the guard clipped."""
    seconds: float
    """Training time."""


def configure(setting: Setting, seed: int, overrides: Sequence[str] = ()) -> Config:
    """The configuration of one run of ``setting``; the corpus of an easy one is still to be given."""
    return load_config("tiny", (f"seed={seed}", *SHORT, *setting.overrides, *overrides)).config


def train(config: Config, num_steps: int) -> Trained:
    """Train ``num_steps`` steps in this process; every step is measured before its update, as the worker does."""
    training, model = config.training, config.model
    stream = open_stream(config, "train")
    network = build_model(model, training.sequence_length, seed=config.seed)
    optimizer = build_optimizer(network, config)
    guard, points, watch = build_guard(config.optimizer), list[Point](), watch_routers(network)
    num_refused = num_clipped = 0
    started = time.perf_counter()
    for step in range(num_steps):
        if is_corruption_due(config.drill, step=step, recoveries=0, rank=0, world_size=1):
            corrupt_half(network, optimizer, config)
        outputs = network(input_ids=(tokens_BS1 := read_batch(stream, config, step))[:, :-1], use_cache=False)
        loss = torch.nn.functional.cross_entropy(outputs.logits.float().flatten(0, 1), tokens_BS1[:, 1:].flatten())
        readings = watch.take()
        balance = balance_loss(readings, num_sequences=len(tokens_BS1)) if readings else 0.0
        torch.autograd.backward(loss + model.router_loss_coefficient * balance)
        norm = torch.nn.utils.get_total_norm([p.grad for p in network.parameters() if p.grad is not None])
        measured = float(loss.detach())
        points.append(Point(step=step + 1, loss=measured, gradient_norm=float(norm)))
        decision = guard.observe(measured, float(norm))
        limits = [limit for limit in (decision.max_norm, training.max_gradient_norm) if limit is not None]
        if limits:
            torch.nn.utils.clip_grads_with_norm_(network.parameters(), min(limits), norm)
        for group in optimizer.param_groups:
            group["lr"] = step_learning_rate(config, step + 1)
        if decision.apply:
            optimizer.step()
        optimizer.zero_grad()
        num_refused += not decision.apply
        num_clipped += decision.max_norm is not None
    return Trained(
        points=tuple(points),
        num_refused=num_refused,
        num_clipped=num_clipped,
        seconds=time.perf_counter() - started,
    )


def build_optimizer(network: torch.nn.Module, config: Config) -> torch.optim.AdamW:
    """AdamW with the worker's optimizer groups: matrices decayed, vectors not."""
    optimizer, parameters = config.optimizer, list(network.parameters())
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": optimizer.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=0.0,
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.epsilon,
        foreach=True,
    )


def read_batch(stream: TokenStream, config: Config, step: int) -> torch.Tensor:
    """Token ids ``[B, S + 1]`` of the global batch of ``step`` (from 0), poisoned where the drill says so."""
    count = config.training.batch_sequences
    first = step * count
    tokens_BS1, places = torch.from_numpy(stream.read(first, count).tokens_BS1), range(first, first + count)
    return poison(tokens_BS1, places, config.drill, vocab_size=config.model.vocab_size, seed=config.seed)


def corrupt_half(network: torch.nn.Module, optimizer: torch.optim.AdamW, config: Config) -> None:
    """Damage what the first of two ranks holds: the first half of every parameter's rows."""
    for name, parameter in network.named_parameters():
        moment = optimizer.state.get(parameter, {}).get("exp_avg")
        values = [parameter.data] if moment is None else [parameter.data, moment]
        other_half = [value[-(-len(value) // 2) :].clone() for value in values]
        corrupt([(name, parameter)], optimizer, config.drill, rank=0, seed=config.seed)
        for value, kept in zip(values, other_half, strict=True):
            value[-(-len(value) // 2) :] = kept


def describe(trained: Trained, setting: Setting, config: Config) -> dict[str, object]:
    """One line of results: losses before, at and after the fault, and the detector's answer; null for what is not finite."""
    losses = [point.loss for point in trained.points]
    alarm = find_spike(trained.points, rule_of(config))
    onset = setting.fault_step or (alarm.onset_step if alarm else len(losses))
    return {
        "seed": config.seed,
        "guard": config.optimizer.guard,
        "steps": len(losses),
        "loss_before": _finite(np.median(losses[max(0, onset - 32) : onset])),
        "loss_lowest": _finite(min(losses)),
        "loss_highest_after": _finite(max(losses[onset:], default=math.nan)),
        "loss_end": _finite(np.median(losses[-32:])),
        "gradient_norm_highest": _finite(max(point.gradient_norm or 0.0 for point in trained.points)),
        "fault_step": setting.fault_step,
        "alarm": alarm.kind if alarm else None,
        "onset_step": alarm.onset_step if alarm else None,
        "alarm_step": alarm.alarm_step if alarm else None,
        "refused": trained.num_refused,
        "clipped": trained.num_clipped,
        "seconds": round(trained.seconds, 1),
    }


def main() -> None:
    """Train the named settings and print what came of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="settings; see --list")
    parser.add_argument("--list", action="store_true", help="print the settings and their overrides, and stop")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each setting")
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--steps", type=int, help="optimizer steps, instead of the setting's own")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="more overrides")
    parser.add_argument("--curves", type=Path, help="folder for the curves, a JSON file a run")
    options = parser.parse_args()
    if unknown := sorted(set(options.names) - SETTINGS.keys()):
        parser.error(f"no setting {unknown[0]!r}; there are {', '.join(SETTINGS)}")
    if options.list or not options.names:
        for name, setting in SETTINGS.items():
            print(f"{name}: {setting.about}; {setting.num_steps} steps\n    {' '.join((*SHORT, *setting.overrides))}")
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="sums-") as folder:
        easy_text = write_sums(Path(folder))
        for name in options.names:
            for seed in range(options.first_seed, options.first_seed + options.seeds):
                run(name, seed, easy_text, options)


def run(name: str, seed: int, easy_text: str, options: argparse.Namespace) -> None:
    """Train one seed of the setting ``name`` and print its line."""
    setting = SETTINGS[name]
    sources = [f"data.sources=[{easy_text}]"] if setting.is_easy_text else []
    config = configure(setting, seed, [*sources, *options.set])
    trained = train(config, options.steps or setting.num_steps)
    print(json.dumps({"setting": name, **describe(trained, setting, config)}), flush=True)
    if options.curves:
        options.curves.mkdir(parents=True, exist_ok=True)
        rows = [[point.step, point.loss, point.gradient_norm] for point in trained.points]
        (options.curves / f"{name}-{seed}.json").write_text(json.dumps(rows))


def _finite(value: float) -> float | None:
    return round(float(value), 3) if math.isfinite(value) else None


if __name__ == "__main__":
    main()
