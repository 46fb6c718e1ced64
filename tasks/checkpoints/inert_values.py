"""What a pickle's classes and instances become when it is read without being executed: plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MAX_KEY_ITEMS = 64
"""Of a tuple as a key: each use hashes it anew."""


@dataclass(frozen=True, slots=True)
class Name:
    """A class or function that the pickle refers to, by name only."""

    module: str
    """Module."""
    name: str
    """Name in it."""


@dataclass(slots=True, eq=False)
class Record:
    """What would have been an instance: the class, its arguments, its state. Hashed by identity."""

    name: Name
    """Class or function."""
    args: tuple[Any, ...]
    """Arguments it would have been called with."""
    state: Any = None
    """State it would have been given."""
    items: list[Any] | None = None
    """Items that would have been appended, or pairs that would have been set."""


@dataclass(frozen=True, slots=True, eq=False)
class PersistentId:
    """A reference to an object outside the pickle."""

    value: Any
    """What the pickle says of it."""


_PLAIN_KEYS = frozenset({str, int, float, bool, bytes, type(None), Record, Name})


def as_key(value: Any) -> Any:
    """``value`` if it may be a key, else TypeError.

    Hashing a tuple of a million levels would overflow the C stack, one of a million items again and again take for ever.
    """
    if type(value) in _PLAIN_KEYS:
        return value
    if type(value) is tuple and len(value) <= MAX_KEY_ITEMS and all(type(item) in _PLAIN_KEYS for item in value):
        return value
    raise TypeError(f"{type(value).__name__} as a key")
