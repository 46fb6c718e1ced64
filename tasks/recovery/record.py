"""What is on record of spikes: measured points in the journal, alarms in segments."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from cluster.journal import journal_keys, read_journal_object
from cluster.storage import Store
from tasks.recovery.rule import Alarm, Point, points_of


def read_points(store: Store, step: int, count: int | None = None) -> list[Point]:
    """The last ``count`` (None: all) journalled points up to ``step`` on the run's way, oldest first.

    Read backwards: what a later segment measured stands for what earlier ones did from its first step on, so that
    stretches that were trodden twice, or left behind by a recovery, count once.
    """
    found: list[Point] = []
    limit = step
    for key in reversed(journal_keys(store)):
        for point in reversed(list(points_of(read_journal_object(store, key)))):
            if point.step <= limit:
                found.append(point)
                limit = point.step - 1
        if limit <= 0 or (count is not None and len(found) >= count):
            break
    return found[:count][::-1]


def alarm_fields(alarm: Alarm) -> dict[str, Any]:
    """``alarm`` as JSON holds it: numbers that are not finite as text."""
    values = dataclasses.asdict(alarm)
    return values | {"value": alarm.value if math.isfinite(alarm.value) else str(alarm.value)}


def parse_alarm(values: dict[str, Any]) -> Alarm:
    """The alarm of :func:`alarm_fields`."""
    return Alarm(**(values | {"value": float(values["value"])}))
