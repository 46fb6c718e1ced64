"""Fill a network with the weights of a checkpoint, once every tensor of both is accounted for."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tasks.checkpoints.reader import Checkpoint
from tasks.checkpoints.regions import TensorPlace
from tasks.checkpoints.safetensors_header import CheckpointError
from tasks.models.disk_layout import model_tensors, pieces_of
from tasks.models.slice_reads import TORCH_DTYPES, plan_reads, run_reads


def load_weights(network: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """Overwrite every parameter and saved buffer of ``network`` with the weights of ``checkpoint``.

    Raises :class:`CheckpointError` unless the checkpoint holds exactly the network's tensors.
    """
    tensors = model_tensors(network)
    require_census(tensors, checkpoint.model, checkpoint.url)
    run_reads(
        checkpoint.store,
        [read for name, t in tensors.items() for read in plan_reads(checkpoint.model, name, t.shape, 0, t.detach())],
    )


def require_census(
    parameters: Mapping[str, torch.Tensor], places: Mapping[str, TensorPlace], url: str, prefix: str = ""
) -> None:
    """Every disk tensor of ``parameters``, by layout name, is at ``places`` with its shape, and nothing else is."""
    if problems := census_problems(parameters, places, prefix):
        raise CheckpointError(f"{url} does not fit the network: {'; '.join(problems[:20])}")


def census_problems(
    parameters: Mapping[str, torch.Tensor], places: Mapping[str, TensorPlace], prefix: str = ""
) -> list[str]:
    """How ``places`` differ from the disk tensors of ``parameters``, by layout name; empty if all fit and none is left over."""
    expected = {
        prefix + piece.disk_name: piece.shape for name, p in parameters.items() for piece in pieces_of(name, p.shape)
    }
    problems = [f"missing {name}" for name in sorted(expected.keys() - places.keys())]
    problems += [f"unknown {name}" for name in sorted(places.keys() - expected.keys()) if name.startswith(prefix)]
    problems += [
        f"{name} has shape {list(places[name].shape)}, the network {list(shape)}"
        for name, shape in expected.items()
        if name in places and places[name].shape != shape
    ]
    problems += [
        f"{name} has dtype {places[name].dtype}, which holds no weights"
        for name in expected
        if name in places and places[name].dtype not in TORCH_DTYPES
    ]
    return problems
