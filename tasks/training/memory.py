"""Whether a rank can hold its share of the training state: said with numbers before any of it is in memory.

The floor is what no setting changes: float32 masters, gradients and AdamW's two moments, 16 bytes a parameter, divided by
the ranks of a replica. Activations come on top and are not counted.
"""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import torch
from torch import nn

from configs.errors import UserError
from configs.schema import Config

STATE_BYTES = 16
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
CPU_MARK = "can't allocate memory"
"""How torch's allocator for host memory says so."""


class OutOfMemory(Exception):
    """A rank could not allocate what a step needs; the message says how much, where, and what takes less."""


def require_memory(network: nn.Module, *, shards: int, ranks_here: int, device: torch.device) -> None:
    """Refuse a ``network`` (on the meta device, not cut yet) whose training state does not fit on ``shards`` ranks.

    ``ranks_here`` share this host's memory. Raises :class:`configs.errors.UserError` with the numbers.
    """
    parameters = sum(parameter.numel() for parameter in network.parameters())
    needed = parameters * STATE_BYTES // shards
    if device.type == "cuda":
        has, what = torch.cuda.get_device_properties(device).total_memory, "its GPU has"
    else:
        has, what = host_bytes() // ranks_here, f"this host has {host_bytes() / 2**30:.1f} GiB for {ranks_here}, each"
    if needed > has:
        raise UserError(
            f"a rank needs at least {needed / 2**30:.1f} GiB for weights, gradients and moments ({parameters:,} parameters x "
            f"{STATE_BYTES} bytes over {shards} ranks of a replica), {what} {has / 2**30:.1f} GiB; use more workers "
            "(training.num_workers), fewer replicas (training.data_parallel_replicas) or a smaller model"
        )


def explain_out_of_memory(error: BaseException, config: Config, *, rank: int, step: int) -> OutOfMemory | None:
    """What to do about ``error``, if it is an allocation that failed."""
    if not (isinstance(error, torch.OutOfMemoryError) or CPU_MARK in str(error)):
        return None
    training = config.training
    return OutOfMemory(
        f"rank {rank} ran out of memory at step {step}: {str(error).splitlines()[0]} Of this gang's settings these take less: "
        f"training.micro_batches (now {training.micro_batches}), training.activation_checkpointing "
        f"(now {training.activation_checkpointing}), more workers"
    )


def ranks_on_this_host() -> int:
    """Ranks of the gang that share this host's memory, as Ray Train says; 1 if nobody says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def host_bytes() -> int:
    """Memory of this host, or of the container that this process is in."""
    total = psutil.virtual_memory().total
    limit = CGROUP_LIMIT.read_text().strip() if CGROUP_LIMIT.exists() else "max"
    return total if limit == "max" else min(total, int(limit))
