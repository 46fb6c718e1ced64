"""Write real torch.distributed.checkpoint folders, as trainers do, at any number of ranks.

Run as a module it is one rank of a gang (:mod:`tests.gloo_ranks`).
"""

from __future__ import annotations

import json
import pickle
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from tests.gloo_ranks import end_ranks, gloo_rank, start_ranks

Tensors = Mapping[str, torch.Tensor]


def write_plain(folder: Path, tensors: Tensors, optimizer: Mapping[str, Any] | None = None) -> None:
    """One process: ``{"model": tensors, "optimizer": ...}``."""
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(
            {"model": dict(tensors), **({"optimizer": dict(optimizer)} if optimizer else {})}, checkpoint_id=folder
        )


@dataclass(frozen=True, kw_only=True)
class Job:
    """One folder that a gang of ranks writes."""

    kind: Literal["sharded", "fsdp2", "megatron"]
    folder: Path
    payload: dict[str, Any]


def sharded(folder: Path, tensors: Tensors, dim: int = 0) -> Job:
    """Every tensor as a DTensor sharded along ``dim`` over the ranks; those without that dimension whole."""
    return Job(kind="sharded", folder=folder, payload={"tensors": dict(tensors), "dim": dim})


def fsdp2(folder: Path, tensors: Tensors) -> Job:
    """A module of these parameters under FSDP2, with its AdamW state after a step at learning rate 0."""
    return Job(kind="fsdp2", folder=folder, payload={"tensors": dict(tensors)})


def megatron(folder: Path, tensors: Tensors) -> Job:
    """Megatron-Core's ``torch_dist`` layout.

    Flat keys, tensors with a leading layer axis stored in parts, optimizer tensors beside, common.pt and metadata.json, and
    Megatron's own attribute on the metadata.
    """
    state = {
        f"optimizer.state.{kind}.{name}": t.float() for name, t in tensors.items() for kind in ("exp_avg", "fp32_param")
    }
    return Job(kind="megatron", folder=folder, payload={"tensors": {**tensors, **state}, "dim": 0})


def write(world_size: int, jobs: Sequence[Job]) -> None:
    """Carry out ``jobs`` with ``world_size`` ranks, started once for all of them."""
    with tempfile.TemporaryDirectory() as scratch:
        torch.save(
            [{"kind": job.kind, "folder": str(job.folder), **job.payload} for job in jobs], Path(scratch) / "jobs.pt"
        )
        ranks = start_ranks(["-m", "tests.dcp_checkpoints"], world_size, Path(scratch), scratch)
        end_ranks(ranks, timeout_seconds=120)
    for job in jobs:
        if job.kind == "megatron":
            _finish_megatron(job.folder)


def _finish_megatron(folder: Path) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.mcore_data = {"optimizer.state.exp_avg.x": {"nd_reformulated_orig_global_shape": (2, 3)}}
    metadata.planner_data = None
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    (folder / "metadata.json").write_text(
        json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch"})
    )
    torch.save({"iteration": 7, "args": {"lr": 1.0}}, folder / "common.pt")


def _write_as_rank(scratch: str) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh

    warnings.simplefilter("ignore")
    with gloo_rank() as (_, world_size):
        mesh = init_device_mesh("cpu", (world_size,))
        for job in torch.load(Path(scratch) / "jobs.pt"):
            state = _fsdp2_state(job["tensors"], mesh) if job["kind"] == "fsdp2" else _sharded_state(job, mesh)
            dcp.save({"model": state} if job["kind"] == "sharded" else state, checkpoint_id=job["folder"])


def _sharded_state(payload: dict[str, Any], mesh: Any) -> dict[str, Any]:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    dim = payload["dim"]
    return {
        name: distribute_tensor(tensor, mesh, [Shard(dim) if tensor.ndim > dim else Replicate()])
        for name, tensor in payload["tensors"].items()
    }


def _fsdp2_state(tensors: Tensors, mesh: Any) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.fsdp import fully_shard

    root = torch.nn.Module()
    for name, tensor in tensors.items():
        module = root
        *path, leaf = name.split(".")
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, torch.nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(leaf, torch.nn.Parameter(tensor))
        # A unit each: FSDP2 wants one dtype in a unit. 5 or 7 rows over 2 or 4 ranks are uneven.
        fully_shard(module, mesh=mesh)
    optimizer = torch.optim.AdamW(root.parameters(), lr=0.0)
    for parameter in root.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    model, state = get_state_dict(root, optimizer)
    return {"model": model, "optimizer": state, "train_state": {"step": 1}}


if __name__ == "__main__":
    _write_as_rank(sys.argv[4])
