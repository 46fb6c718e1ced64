"""Typed values from the inert ones that a DCP folder's ``.metadata`` is read as; none of them may be trusted."""

from __future__ import annotations

from typing import Any, TypeGuard

from tasks.checkpoints.inert_values import Record
from tasks.checkpoints.safetensors_header import CheckpointError

MAX_NAME = 4096
MAX_DIMENSIONS = 64
MAX_SIZE = 1 << 63


def is_kind(value: Any, kind: str) -> TypeGuard[Record]:
    """Whether ``value`` stands for an instance of the class of this name; the allow-list knows one of each."""
    return type(value) is Record and value.name.name == kind


def is_size(value: Any) -> TypeGuard[int]:
    """Whether ``value`` can be a length, an offset or a coordinate."""
    return type(value) is int and 0 <= value < MAX_SIZE


def parse_fields(value: Any, kind: str, where: str) -> dict[Any, Any]:
    """Fields of an instance of ``kind``; :class:`CheckpointError` for anything else."""
    if not is_kind(value, kind) or not isinstance(value.state, dict):
        raise CheckpointError(f"{where}: expected {kind}, got {type(value).__name__}")
    return value.state


def parse_mapping(value: Any, where: str) -> dict[Any, Any]:
    """A dict or an OrderedDict; :class:`CheckpointError` for anything else."""
    if is_kind(value, "OrderedDict"):
        pairs = value.items or []
        if not all(isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs):
            raise CheckpointError(f"{where}: an OrderedDict of other items than named ones")
        return dict(pairs)
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: {type(value).__name__} instead of a dict by name")
    return value


def parse_name(value: Any, where: str) -> str:
    """``value`` if it can be a name: messages, headers and URLs will carry it; else :class:`CheckpointError`."""
    if not isinstance(value, str) or not 0 < len(value) <= MAX_NAME or not value.isprintable():
        raise CheckpointError(f"{where}: a name of {type(value).__name__} that is empty, too long or cannot be printed")
    return value


def parse_sizes(value: Any, where: str) -> tuple[int, ...]:
    """The integers of a torch.Size; :class:`CheckpointError` for anything else."""
    numbers = value.args[0] if is_kind(value, "Size") and value.args else value
    if not isinstance(numbers, (tuple, list)) or len(numbers) > MAX_DIMENSIONS or not all(map(is_size, numbers)):
        raise CheckpointError(f"{where}: {type(value).__name__} is not a shape")
    return tuple(numbers)
