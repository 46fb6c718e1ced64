"""Training under pma against the plainest loop of torch that trains the same: two gloo ranks, in turns, in one run.

``python -m benchmarks.train [--rounds 5] [--steps 250] [--config tiny] [KEY=VALUE...]``

Every round trains ``--steps`` steps with a bare loop (transformers model, FSDP2, AdamW, clipping, the loss of each
step over all ranks) and as many under pma (data stream, router health, journal, spike watch, asynchronous snapshots at
the configured interval), in the same two processes with the same batches' shapes. Prints the ratio of their steps per
second as median and range over rounds, and what a snapshot cost the step that took it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.load import config_to_dict, load_config
from configs.schema import Config

WORLD_SIZE = 2
WARMUP_STEPS = 20


def main() -> None:
    """Start the two ranks and print what they measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--config", default="tiny")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args()
    if options.rank is not None:
        run_rank(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.train", *sys.argv[1:], "--folder", folder]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        ranks = [subprocess.Popen([*command, "--rank", str(rank)], env=env) for rank in range(WORLD_SIZE)]
        for rank in ranks:
            if rank.wait():
                sys.exit(f"a rank ended with {rank.returncode}")
        rounds = [json.loads(line) for line in (Path(folder) / "rounds.jsonl").read_text().splitlines()]
    print(json.dumps(summarise(rounds)))


def summarise(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians and ranges."""
    ratios = [row["pma_steps_per_second"] / row["bare_steps_per_second"] for row in rounds]
    stalls = [stall for row in rounds for stall in row["stalls_seconds"]]
    step = statistics.median(1 / row["pma_steps_per_second"] for row in rounds)
    return {
        "rounds": len(rounds),
        "bare_steps_per_second": round(statistics.median(row["bare_steps_per_second"] for row in rounds), 2),
        "pma_steps_per_second": round(statistics.median(row["pma_steps_per_second"] for row in rounds), 2),
        "ratio_median": round(statistics.median(ratios), 4),
        "ratio_range": [round(min(ratios), 4), round(max(ratios), 4)],
        "step_milliseconds": round(1000 * step, 2),
        "snapshots": len(stalls),
        "stall_milliseconds_median": round(1000 * statistics.median(stalls), 2) if stalls else None,
        "stall_in_steps_median": round(statistics.median(stalls) / step, 2) if stalls else None,
        "stall_in_steps_largest": round(max(stalls) / step, 2) if stalls else None,
    }


def run_rank(options: argparse.Namespace) -> None:
    """One rank's rounds."""
    import torch
    import torch.distributed as dist

    from tests.gloo_ranks import leave_together

    torch.set_num_threads(1)
    folder = Path(options.folder)
    meeting = str(folder / "meeting")
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=options.rank, world_size=WORLD_SIZE)
    config = load_config(options.config, options.overrides).config
    total = options.steps * config.training.batch_tokens
    config = load_config(
        options.config, [*options.overrides, f"training.total_tokens={total}", "evaluation.while_training=false"]
    ).config
    train_bare(config, options.rank, WARMUP_STEPS)
    for number in range(options.rounds):
        bare = train_bare(config, options.rank, options.steps)
        under_pma, stalls = train_under_pma(config, options.rank, folder / f"run-{number}")
        if options.rank == 0:
            row = {
                "bare_steps_per_second": options.steps / bare,
                "pma_steps_per_second": options.steps / under_pma,
                "stalls_seconds": stalls,
            }
            print(json.dumps({key: value for key, value in row.items() if key != "stalls_seconds"}), file=sys.stderr)
            with (folder / "rounds.jsonl").open("a") as rounds:
                rounds.write(json.dumps(row) + "\n")
    leave_together(meeting, options.rank, WORLD_SIZE)


def train_bare(config: Config, rank: int, steps: int) -> float:
    """Seconds of ``steps`` steps of a plain loop."""
    import numpy as np
    import torch
    import torch.distributed as dist
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    from tasks.data.domains import open_domains
    from tasks.models.build import build_model
    from tasks.training.sharding.sharded_model import select_device

    training, world_size, device = config.training, dist.get_world_size(), select_device(config)
    row = open_domains(config.data, "train")[0].row
    network = build_model(config.model, training.sequence_length, seed=config.seed).to(device)
    is_half = training.compute_dtype == "bfloat16"
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = half if is_half else MixedPrecisionPolicy()
    if training.fsdp_unit == "layer":
        for layer in network.model.layers:
            fully_shard(layer, mp_policy=policy)
    fully_shard(network, mp_policy=policy)
    # transformers' own load-balance loss, as a plain loop has it.
    network.config.output_router_logits = config.model.is_moe
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=config.schedule.peak_learning_rate, betas=(0.9, 0.95), fused=device.type == "cuda"
    )
    draws = np.random.default_rng(rank)
    share = training.batch_sequences // world_size
    dist.barrier()
    started = time.perf_counter()
    for _ in range(steps):
        starts = draws.integers(row.num_tokens - training.sequence_length - 1, size=share)
        tokens_BS = torch.from_numpy(row.read_windows(starts, training.sequence_length + 1)).to(device)
        outputs = network(input_ids=tokens_BS[:, :-1], labels=None, use_cache=False)
        loss = torch.nn.functional.cross_entropy(outputs.logits.float().flatten(0, 1), tokens_BS[:, 1:].flatten())
        auxiliary = getattr(outputs, "aux_loss", None)
        torch.autograd.backward(loss if auxiliary is None else loss + config.model.router_loss_coefficient * auxiliary)
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / world_size
        dist.all_reduce(mean)
        float(mean)
    dist.barrier()
    return time.perf_counter() - started


def train_under_pma(config: Config, rank: int, folder: Path) -> tuple[float, list[float]]:
    """Seconds of the same number of steps as a segment of a run, and what each snapshot cost the loop."""
    import torch.distributed as dist

    from cluster.journal import read_journal
    from cluster.lease import hold_lease
    from tasks.checkpoints.run_folder import RUN_LEASE, RunFolder
    from tasks.training.roll_call import open_roll_call
    from tasks.training.segment import Segment
    from tasks.training.worker import SegmentTask, Worker

    run = RunFolder(str(folder))
    tokens = [""]
    with hold_lease(run.store, RUN_LEASE) if rank == 0 else _nothing() as lease:
        if lease is not None:
            run.begin(config)
            tokens = [lease.token]
        dist.broadcast_object_list(tokens, src=0)
        task = SegmentTask(
            run_url=run.url, config=config_to_dict(config), lease_token=tokens[0], cause="start", launched=time.time()
        )
        roll_call = open_roll_call(rank, dist.get_world_size())
        worker = Worker(task, roll_call)
        segment = Segment(worker, worker.restore())
        dist.barrier()
        started = time.perf_counter()
        segment.train()
        dist.barrier()
        seconds = time.perf_counter() - started
        roll_call.end()
    rows = read_journal(run.store) if rank == 0 else []
    return seconds, [row.metrics[STALL] for row in rows if STALL in row.metrics]


STALL = "snapshot/stall_seconds"


def _nothing() -> Any:
    from contextlib import nullcontext

    return nullcontext()


if __name__ == "__main__":
    main()
