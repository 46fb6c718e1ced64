"""Training on one GPU: NCCL against CPU float32, tokens/s and model FLOPs utilisation against a bare loop, what a snapshot costs.

``python -m benchmarks.gpu [--device cuda] [--rounds 3] [--steps 20] [--peak-tflops 989] [--config moe-0.7b-7b] --data URL... [KEY=VALUE...]``

1. **Correctness**: ``tiny`` for 20 steps under pma on CPU in float32, and on the device in float32 and in bfloat16; largest
   difference of the steps' losses.
2. **Speed**: ``--config`` in bfloat16 with grouped expert matmuls and compiled layers, a plain loop of torch with the same
   model and as many tokens, and pma with a snapshot at the end, in turns in one process.
3. **Merging**: ten stored copies of a 256 MiB tensor averaged by our engine's kernel on the CPU and by torch on the device.

Prints one JSON object. Utilisation counts 6 FLOPs a parameter that is active and a token, and 12 L H S a token for attention
(H heads times head size), as PaLM's appendix B does (arXiv 2204.02311); ``--peak-tflops`` is the device's dense bfloat16 peak.
Without a GPU, ``--device cpu`` runs the same code at a size that fits, to see that it runs; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.train import train_bare, train_under_pma
from configs.load import load_config
from configs.schema import Config
from tasks.models.size import active_parameters

LARGE = (
    "model.num_experts=64", "training.num_workers=1", "training.batch_tokens=65536", "training.micro_batches=4",
    "training.compute_dtype=bfloat16", "training.activation_checkpointing=layer", "training.compile=true",
)  # fmt: skip
"""On top of ``moe-0.7b-7b``: the experts of a 7 B model halved, so that float32 masters and moments fit one H200."""
NUM_MERGED, MERGE_ELEMENTS = 10, 1 << 26


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="of an H200, dense bfloat16")
    parser.add_argument("--config", default="moe-0.7b-7b")
    parser.add_argument("--data", nargs="+", default=["python://stdlib"], help="text; ids of bytes fit any vocabulary")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args()
    import torch
    import torch.distributed as dist

    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no GPU is visible here; --device cpu runs the same code, for its own sake")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        backend = "cpu:gloo,cuda:nccl" if options.device == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/meeting", rank=0, world_size=1)
        try:
            answer = {
                "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
                "correctness": measure_correctness(options.device, Path(folder)),
                "speed": measure_speed(options, Path(folder)),
                "merge": measure_merge(options.device),
            }
        finally:
            dist.destroy_process_group()
    print(json.dumps(answer, indent=1))


def measure_correctness(device: str, folder: Path) -> dict[str, float]:
    """Largest difference of a step's loss from CPU float32, in nats, over 20 steps of ``tiny``."""
    reference = _losses("cpu", "float32", folder)
    found = {dtype: _losses(device, dtype, folder) for dtype in ("float32", "bfloat16")}
    return {
        f"{dtype}_largest_loss_difference": max(abs(a - b) for a, b in zip(reference, losses, strict=True))
        for dtype, losses in found.items()
    }


def measure_speed(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Bare loop and pma in turns: tokens a second, their ratio, utilisation, milliseconds that a snapshot stood in the way."""
    config = speed_config(options)
    train_bare(config, 0, 3)
    rows = []
    for number in range(options.rounds):
        bare = train_bare(config, 0, options.steps)
        under_pma, stalls = train_under_pma(config, 0, folder / f"speed-{number}")
        rows.append((bare, under_pma, stalls))
    tokens = options.steps * config.training.batch_tokens
    speed = tokens / statistics.median(under_pma for _, under_pma, _ in rows)
    return {
        "parameters_active": active_parameters(config.model, config.training.sequence_length),
        "bare_tokens_per_second": tokens / statistics.median(bare for bare, _, _ in rows),
        "pma_tokens_per_second": speed,
        "ratio_median": statistics.median(bare / under_pma for bare, under_pma, _ in rows),
        "model_flops_utilisation": speed * flops_per_token(config) / (options.peak_tflops * 1e12),
        "snapshot_stall_milliseconds": [round(1000 * stall, 1) for _, _, stalls in rows for stall in stalls],
    }


def speed_config(options: argparse.Namespace) -> Config:
    """The configuration of the speed measurement, with as many tokens as steps and one snapshot at the end."""
    large = LARGE if options.config == "moe-0.7b-7b" else ("training.num_workers=1",)
    given = (*large, f"data.sources=[{','.join(options.data)}]", "data.held_out_fraction=0.08", *options.overrides)
    batch = load_config(options.config, (*given, f"training.device={options.device}")).config.training.batch_tokens
    total = options.steps * batch
    lengths = (
        f"training.total_tokens={total}", f"snapshots.interval_tokens={total}", f"schedule.warmup_tokens={batch}",
        "schedule.decay_tokens=0", f"anneal.tokens={batch}", "merge.interval_tokens=null", "evaluation.while_training=false",
    )  # fmt: skip
    return load_config(options.config, (*given, *lengths, f"training.device={options.device}")).config


def flops_per_token(config: Config) -> float:
    """Of forward and backward: 6 a parameter that is active, 12 L H S for attention (arXiv 2204.02311, appendix B)."""
    model = config.model
    head_size = model.head_size or model.hidden_size // model.num_attention_heads
    attention = 12 * model.num_layers * model.num_attention_heads * head_size * config.training.sequence_length
    return 6.0 * active_parameters(config.model, config.training.sequence_length) + attention


def measure_merge(device: str, elements: int = MERGE_ELEMENTS) -> dict[str, float]:
    """Seconds to average ten float32 tensors that lie in host memory: our kernel, and torch on the device with the copies."""
    import numpy as np
    import torch

    from tasks.merging.kernel import new_sum

    inputs = [np.random.default_rng(number).standard_normal(elements, dtype=np.float32) for number in range(NUM_MERGED)]
    started = time.perf_counter()
    total_cpu = new_sum(elements, ["F32"] * NUM_MERGED, None, "F32")
    for number, array in enumerate(inputs):
        total_cpu.add(memoryview(array).cast("B"), "F32", None, first=number == 0)
    stored, _ = total_cpu.store(elements, "F32", 1 / NUM_MERGED)
    merged = np.frombuffer(stored, dtype=np.float32)
    ours = time.perf_counter() - started
    started = time.perf_counter()
    total = torch.zeros(elements, dtype=torch.float32, device=device)
    for array in inputs:
        total += torch.from_numpy(array).to(device) / NUM_MERGED
    on_device = total.cpu().numpy()
    theirs = time.perf_counter() - started
    return {
        "cpu_seconds": ours,
        "device_seconds": theirs,
        "largest_difference": float(np.abs(merged - on_device).max()),
    }


def _losses(device: str, dtype: str, folder: Path) -> Sequence[float]:
    from cluster.journal import read_journal
    from tasks.checkpoints.run_folder import RunFolder

    config = load_config(
        "tiny",
        (
            "training.num_workers=1", f"training.device={device}", f"training.compute_dtype={dtype}", "schedule.warmup_tokens=2048",
            "training.total_tokens=40960", "snapshots.interval_tokens=40960", "anneal.tokens=2048",
        ),
    ).config  # fmt: skip
    run = folder / f"correctness-{device}-{dtype}-{time.time_ns()}"
    train_under_pma(config, 0, run)
    return [row.metrics["train/loss"] for row in read_journal(RunFolder(str(run)).store)]


if __name__ == "__main__":
    main()
