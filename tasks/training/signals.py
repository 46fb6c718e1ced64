"""What ranks tell each other at every step: one small all-reduce that carries the loss and some flags."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True, kw_only=True)
class Signals:
    """Flags that any rank may raise; after the step every rank has seen them, and at the same step."""

    has_alarm: bool = False
    """A spike was found."""
    should_stop: bool = False
    """The worker or its node is about to be taken away."""
    is_ephemeral_due: bool = False
    """Enough time has passed for a snapshot between those of the interval."""


def share_signals(loss_share: torch.Tensor, signals: Signals) -> tuple[float, Signals]:
    """The sum of all ranks' ``loss_share`` (a scalar), and the flags that any rank raised."""
    flags = [signals.has_alarm, signals.should_stop, signals.is_ephemeral_due]
    message = torch.stack([loss_share.float(), *(loss_share.new_tensor(float(flag)) for flag in flags)])
    dist.all_reduce(message)
    loss, alarm, stop, ephemeral = message.tolist()
    return loss, Signals(has_alarm=alarm > 0, should_stop=stop > 0, is_ephemeral_due=ephemeral > 0)
