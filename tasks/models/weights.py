"""Fill a network with the weights of a checkpoint, once every tensor of both is accounted for."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tasks.checkpoints.digest import new_hasher
from tasks.checkpoints.reader import Checkpoint
from tasks.checkpoints.regions import TensorPlace
from tasks.checkpoints.safetensors_header import DTYPE_BYTES, CheckpointError
from tasks.checkpoints.tensor_reader import TensorReader
from tasks.models.disk_layout import model_tensors, pieces_of
from tasks.models.slice_reads import NUM_READERS, READ_BYTES, TORCH_DTYPES


def load_weights(network: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """Overwrite every parameter and saved buffer of ``network`` with the weights of ``checkpoint``, in the network's dtypes.

    Beside the network it holds at most :data:`NUM_READERS` reads of 64 MiB. Raises :class:`CheckpointError` unless the
    checkpoint holds exactly the network's tensors, with the digests that its manifest states if it has one; the network's
    weights are then of no use.
    """
    tensors = model_tensors(network)
    require_census(tensors, checkpoint.model, checkpoint.url)
    readers = NUM_READERS if checkpoint.store.reads_ahead else 1
    with TensorReader(checkpoint.store) as reader, concurrent.futures.ThreadPoolExecutor(readers, "load") as pool:
        loads = [load for name, tensor in tensors.items() for load in _loads(checkpoint, name, tensor.detach())]
        running = [pool.submit(_fill, reader, load) for load in loads]
        try:
            for future in concurrent.futures.as_completed(running):
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


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


@dataclass(frozen=True, kw_only=True, eq=False)
class _Load:
    """A stored tensor and where its values belong."""

    url: str
    name: str
    place: TensorPlace
    target: torch.Tensor
    """One-dimensional view, as many elements as the tensor has."""


def _loads(checkpoint: Checkpoint, name: str, tensor: torch.Tensor) -> Iterator[_Load]:
    for piece in pieces_of(name, tensor.shape):
        place = checkpoint.model[piece.disk_name]
        yield _Load(url=checkpoint.url, name=piece.disk_name, place=place, target=piece.of(tensor).view(-1))


def _fill(reader: TensorReader, load: _Load) -> None:
    """Read a tensor in order, so that it can be hashed on the way; several tensors are read at once."""
    stored, hasher = TORCH_DTYPES[load.place.dtype], new_hasher()
    step = READ_BYTES // DTYPE_BYTES[load.place.dtype]
    is_direct = stored == load.target.dtype and load.target.device.type == "cpu"
    for start in range(0, load.target.numel(), step):
        part = load.target[start : start + step]
        values = part if is_direct else torch.empty(part.shape, dtype=stored)
        data: Any = values.view(torch.uint8).numpy()
        reader.read_into(load.place, start, start + part.numel(), memoryview(data))
        if load.place.digest:
            hasher.update(memoryview(data))
        if not is_direct:
            part.copy_(values)
    digest = str(hasher.hexdigest())
    if load.place.digest and digest != load.place.digest:
        raise CheckpointError(
            f"{load.url}/{load.place.regions[0].key}: tensor {load.name!r} has digest {digest[:16]}, its manifest says "
            f"{load.place.digest[:16]}: the object was changed or damaged after it was committed"
        )
