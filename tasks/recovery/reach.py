"""How far back recoveries may have to reach from here: what retention keeps of a run for a spike that is yet to come."""

from __future__ import annotations

from collections.abc import Sequence

from configs.schema import Config
from tasks.checkpoints.recoveries import Recovery
from tasks.checkpoints.retention import SpikeReach
from tasks.recovery.tries import reach_of_try


def reach_of(config: Config, newest_step: int, history: Sequence[Recovery]) -> SpikeReach | None:
    """Which snapshots the tries at a spike may ask for that is noticed at ``newest_step``, a snapshot's, or later.

    The onset of a spike lies ``recovery.patience_steps`` or less before the step at which it is noticed. While the newest
    recovery of ``history`` is not confirmed, the same spike may be noticed again, whose onset is that recovery's at the
    latest. The last try goes ``max_attempts - 1`` intervals further back than the first and asks for the most snapshots.
    A slow climb, whose onset is where the loss was lowest, can lie further back: it then finds fewer. None where the
    policy never goes back by itself.
    """
    rule = config.recovery
    if rule.policy in ("ignore", "stop"):
        return None
    onset_step = newest_step - rule.patience_steps
    if history and newest_step <= history[-1].confirm_step:
        onset_step = min(onset_step, history[-1].onset_step)
    return reach_of_try(config, onset_step, rule.max_attempts)
