"""Where training begins if not from fresh weights."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class StartPoint:
    """Where a run or a segment begins if not from fresh weights: a checkpoint."""

    url: str
    """Its URL."""
    digest: str
    """Its content digest."""
    step: int
    """Its step; training counts on from there."""
    tokens_seen: int
    """Its tokens seen."""
