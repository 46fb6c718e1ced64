"""Where training begins if not from fresh weights."""

from __future__ import annotations

from dataclasses import dataclass

from configs.errors import UserError


class WeightsReplaced(UserError):
    """The checkpoint that a run was begun with holds other weights by now."""


@dataclass(frozen=True, kw_only=True)
class StartPoint:
    """Where a run or a segment begins if not from fresh weights: a checkpoint, continued or for its weights alone."""

    url: str
    """Its URL."""
    digest: str
    """Its content digest."""
    step: int
    """Its step, from which training counts on; 0 for weights alone."""
    tokens_seen: int
    """Its tokens seen; 0 for weights alone."""
    weights_only: bool = False
    """Whether training initialises from its weights: data, schedule, Adam's moments and guards begin afresh."""


def require_digest(start: StartPoint, found: str) -> None:
    """Raise :class:`WeightsReplaced` unless ``found``, the content digest of what is at its URL now, is that of ``start``."""
    if found != start.digest:
        raise WeightsReplaced(
            f"{start.url} holds other weights (digest {found[:12]}) than when the run was begun with it "
            f"({start.digest[:12]}): put the checkpoint back, or begin another --run with what is there now"
        )
