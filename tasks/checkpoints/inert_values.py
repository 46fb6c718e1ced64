"""What a pickle's classes and instances become when it is read without being executed: plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


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
