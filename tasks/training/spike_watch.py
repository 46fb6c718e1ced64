"""The spike detector beside a segment: fed with each step by rank 0, filled from the journal when a gang begins."""

from __future__ import annotations

from cluster.journal import write_event
from cluster.storage import Store
from configs.schema import Config
from tasks.checkpoints.recoveries import Recovery, write_confirmation
from tasks.recovery.detector import SpikeDetector
from tasks.recovery.policy import rule_of
from tasks.recovery.record import read_points
from tasks.recovery.rule import Alarm, Point

MEMORY_WINDOWS = 3
"""Windows of the detector that are read back from the journal: more than it can remember but for its lowest level."""


class SpikeWatch:
    """Looks at every step of a segment; says so once trouble is a spike, and once a recovery has held."""

    def __init__(self, store: Store, config: Config, recovery: Recovery | None, step: int) -> None:
        self.store = store
        self.recovery = recovery
        self.alarm: Alarm | None = None
        self.is_on = config.recovery.policy != "ignore"
        rule = rule_of(config)
        self._detector = SpikeDetector(rule)
        if self.is_on:
            for point in read_points(store, step, MEMORY_WINDOWS * rule.window_points + 2 * rule.patience_points):
                self.alarm = self._detector.observe(point) or self.alarm

    def observe(self, step: int, loss: float, gradient_norm: float) -> Alarm | None:
        """Take the next step; the alarm, once there is one."""
        if self.is_on and self.alarm is None:
            self.alarm = self._detector.observe(Point(step=step, loss=loss, gradient_norm=gradient_norm))
            if self.alarm is None and self.recovery is not None and step == self.recovery.confirm_step:
                self._confirm(self.recovery, step, loss)
        return self.alarm

    def _confirm(self, recovery: Recovery, step: int, loss: float) -> None:
        facts = {"step": step, "loss": loss, "attempt": recovery.attempt, "policy": recovery.policy}
        if write_confirmation(self.store, recovery.number, facts):
            write_event(self.store, "recovered", {"recovery": recovery.number, **facts})
