"""How long a run took from a spike's alarm to the first step of the segment that recovered from it, phase by phase."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.journal import Measurement


@dataclass(frozen=True, kw_only=True)
class RecoveryPhases:
    """Seconds of wall clock, one phase after the other."""

    recovery: int
    """Number of the recovery."""
    stop: float
    """From the measurement that gave the alarm to the end of the segment on record: one more step, and a snapshot in flight."""
    decide: float
    """From there to the decision on record, without the merge: seen by the driver, planned, written."""
    merge: float
    """Of the healthy snapshots; 0 where training went back to one of them."""
    restart: float
    """From the decision to the new segment on record: seen by the ranks, state restored; a new gang if the old was gone."""
    first_step: float
    """From there to the end of the new segment's first step."""

    @property
    def total(self) -> float:
        """Alarm to the end of the first recovered step."""
        return self.stop + self.decide + self.merge + self.restart + self.first_step


def recovery_phases(
    segments: Sequence[Mapping[str, Any]],
    events: Sequence[Mapping[str, Any]],
    journals: Mapping[int, Sequence[Measurement]],
) -> list[RecoveryPhases]:
    """Phases of every recovery that began with an alarm of the run itself and has trained a step since.

    ``segments`` and ``events`` are the run's records, oldest first, ``journals`` measurements by segment.
    """
    decisions = {int(event["recovery"]): event for event in events if event["kind"] == "recovery"}
    spikes = {int(event["segment"]): event for event in events if event["kind"] == "spike"}
    found = []
    for before, after in itertools.pairwise(segments):
        number = int(after["plan"].get("recovery", 0))
        spike, decision = spikes.get(before["segment"]), decisions.get(number)
        first = next(iter(journals.get(after["segment"], ())), None)
        if spike is None or decision is None or first is None or number == before["plan"].get("recovery", 0):
            continue
        measured = (m.time for m in journals.get(before["segment"], ()) if m.step == spike["step"])
        ended, decided, merged = spike["time"], decision["time"], decision["merge_seconds"]
        found.append(
            RecoveryPhases(
                recovery=number,
                stop=ended - next(measured, ended),
                decide=decided - ended - merged,
                merge=merged,
                restart=after["started"] - decided,
                first_step=first.time - after["started"],
            )
        )
    return found
