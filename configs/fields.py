"""What fields of a configuration are declared and checked with."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from configs.errors import ConfigError


def execution(default: Any) -> Any:
    """Field that does not take part in a run's identity."""
    return field(default=default, metadata={"identity": False})


def added(default: Any) -> Any:
    """Field that runs were made without: it takes part in a run's identity only where it is not its default."""
    return field(default=default, metadata={"identity": "unless default"})


def added_mapping() -> Any:
    """:func:`added` for a field that is a mapping, empty by default."""
    return field(default_factory=dict, metadata={"identity": "unless default"})


def require(condition: bool, key: str, got: object, allowed: str) -> None:
    """Raise :class:`ConfigError` naming ``key``, what it holds and what is allowed."""
    if not condition:
        raise ConfigError(f"{key}={got!r} is not possible; allowed: {allowed}")
