"""Where the time of a run went: named stretches of the driver's wall clock, kept in the run folder."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from cluster.journal import read_events, write_event
from cluster.outages import outages_logged
from cluster.storage import Store


@contextmanager
def timed(store: Store, stage: str, kind: str) -> Iterator[None]:
    """Record the block's duration as an event; ``kind`` is ``training``, ``orchestration`` or ``evidence``.

    Storage that is away when the block ends is logged: it neither fails work that is done nor hides why the block raised.
    """
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds = time.perf_counter() - started
        with outages_logged(f"the record that {stage!r} took {seconds:.1f} s"):
            write_event(store, "timing", {"stage": stage, "accounted_as": kind, "seconds": seconds})


def stage_seconds(store: Store) -> dict[tuple[str, str], float]:
    """Total seconds by (stage, kind), over all invocations."""
    totals: dict[tuple[str, str], float] = {}
    for event in read_events(store):
        if event["kind"] == "timing":
            key = (str(event["stage"]), str(event["accounted_as"]))
            totals[key] = totals.get(key, 0.0) + float(str(event["seconds"]))
    return totals
