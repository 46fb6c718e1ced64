"""Fill a network, or one rank's slices of it, with weights read from a checkpoint by byte range."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from cluster.storage import Store
from tasks.checkpoints.reader import Checkpoint
from tasks.checkpoints.regions import TensorPlace
from tasks.checkpoints.safetensors_header import DTYPE_BYTES, CheckpointError
from tasks.checkpoints.tensor_reader import TensorReader
from tasks.models.disk_layout import Piece, model_tensors, pieces_of

TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def load_weights(network: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """Overwrite every parameter and saved buffer of ``network`` with the weights of ``checkpoint``.

    Raises :class:`CheckpointError` unless the checkpoint holds exactly the network's tensors.
    """
    tensors = model_tensors(network)
    require_census(tensors, checkpoint.model, checkpoint.url)
    for name, tensor in tensors.items():
        read_slice(checkpoint.store, checkpoint.model, name, tensor.shape, 0, tensor.data)


def require_census(
    parameters: Mapping[str, torch.Tensor], places: Mapping[str, TensorPlace], url: str, prefix: str = ""
) -> None:
    """Every disk tensor of ``parameters``, by layout name, is at ``places`` with its shape, and nothing else is."""
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
    if problems:
        raise CheckpointError(f"{url} does not fit the network: {'; '.join(problems[:20])}")


def read_slice(
    store: Store,
    places: Mapping[str, TensorPlace],
    name: str,
    shape: torch.Size,
    row_start: int,
    target: torch.Tensor,
    prefix: str = "",
) -> None:
    """Fill ``target``, rows ``row_start`` and on of the parameter with layout name ``name`` and global ``shape``.

    Reads only the bytes of those rows. ``prefix`` selects a tensor derived from the parameter, such
    as a moment.
    """
    if target.numel() == 0:
        return
    for piece, rows in _covered(pieces_of(name, shape), row_start, target.shape[0] if shape else 1):
        place = places[prefix + piece.disk_name]
        values = _read_rows(store, place, *rows)
        if piece.expert is None:
            target.copy_(values.reshape(target.shape))
        else:
            target[piece.expert - row_start, piece.row_start : piece.row_end].copy_(values)


def _covered(pieces: Iterable[Piece], row_start: int, num_rows: int) -> Iterable[tuple[Piece, tuple[int, int]]]:
    for piece in pieces:
        if piece.expert is None:
            yield piece, (row_start, row_start + num_rows)
        elif row_start <= piece.expert < row_start + num_rows:
            yield piece, (0, piece.row_end - piece.row_start)


def _read_rows(store: Store, place: TensorPlace, row_start: int, row_end: int) -> torch.Tensor:
    row_shape = place.shape[1:]
    row_elements = int(torch.Size(row_shape).numel())
    data = bytearray((row_end - row_start) * row_elements * DTYPE_BYTES[place.dtype])
    if data:
        with TensorReader(store) as reader:
            reader.read_into(place, row_start * row_elements, row_end * row_elements, memoryview(data))
    flat = torch.frombuffer(data, dtype=TORCH_DTYPES[place.dtype]) if data else torch.empty(0)
    return flat.reshape(row_end - row_start, *row_shape)
