"""What ranks tell each other at every step: one small all-reduce that carries the loss and some flags."""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields

import torch
import torch.distributed as dist


@dataclass(frozen=True, kw_only=True)
class Signals:
    """Flags that any rank may raise; after the step every rank has seen them, and at the same step."""

    has_alarm: bool = False
    """A spike was found."""
    should_stop: bool = False
    """The worker or its node is about to be taken away."""
    is_resize_due: bool = False
    """The driver wants to go on with a larger gang."""
    has_failed_snapshot: bool = False
    """A snapshot could not be published."""
    is_ephemeral_due: bool = False
    """Enough time has passed for a snapshot between those of the interval."""


FLAGS = [item.name for item in fields(Signals)]


def share_signals(loss_share: torch.Tensor, signals: Signals) -> tuple[float, Signals]:
    """The sum of all ranks' ``loss_share`` (a scalar), and the flags that any rank raised."""
    flags = torch.tensor([float(flag) for flag in astuple(signals)], device=loss_share.device)
    message = torch.cat([loss_share.float().reshape(1), flags])
    dist.all_reduce(message)
    loss, *raised = message.tolist()
    return loss, Signals(**{name: value > 0 for name, value in zip(FLAGS, raised, strict=True)})
