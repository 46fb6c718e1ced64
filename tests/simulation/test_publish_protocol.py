"""Leases and publication under every order of storage calls that a scheduler can think of, crashes and clocks included.

What is explored, what it promises and where it ends: docs/design/05-leases-and-publishing.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from simulation import planted
from simulation.drivers import SAME_CONTENT, Steps, contender, published, publisher, simulate_processes
from simulation.explore import NOTHING_HAPPENS, Exploration, Explorer, Scenario
from simulation.merging import MEAN, broken_off, build_plan, merger, simulate_storage_of_merges
from simulation.upkeep import break_off, collector, left_behind, recorder, simulate_upkeep
from simulation.world import START, Driver, Rules, World

from cluster.errors import LeaseHeld, LeaseLost
from cluster.lease import EXPIRY_SECONDS, RENEWAL_SECONDS, Lease
from tasks.checkpoints.manifest import model_digest
from tasks.checkpoints.writer import CommitConflict

NUM_RUNS = {"commit": 3500, "without faults": 2500, "three drivers": 2800, "three contenders": 2500}
MIN_INTERLEAVINGS = 10_000
BUDGET = 3000
"""Runs in which a planted bug must be found."""
REFUSALS = (LeaseHeld, LeaseLost)
NO_FAULTS = Rules(crashes=0, losses=0, waits=3)
ON_TIME = Rules(crashes=0, losses=0, waits=4, wait_seconds=RENEWAL_SECONDS, renewals=0, on_time=True)
NOT_ITS_OWN = "although its lease was not its own"
INDEX_DIFFERS = "index.json is listed in a published manifest with another digest"
SKEW_LIMIT_SECONDS = EXPIRY_SECONDS - RENEWAL_SECONDS


def finished_with(*digests: str) -> Callable[[World], str]:
    """What is wrong unless one of ``digests`` is published in the end."""

    def finished(world: World) -> str:
        manifest = published(world)
        if manifest is None:
            return "a driver worked alone, long after, and nothing is published"
        return "" if manifest.digest in digests else f"digest {manifest.digest} is of no attempt"

    return finished


def digest_of_content(data: bytes) -> str:
    return model_digest((planted.describe_unwritten(data),))


COMMIT = Scenario(
    program=publisher(Steps()), refusals=REFUSALS, finished=finished_with(digest_of_content(SAME_CONTENT))
)
DIFFERENT = Scenario(
    program=publisher(Steps(content=planted.content_of_driver)),
    refusals=(*REFUSALS, CommitConflict),
    finished=finished_with(*(digest_of_content(planted.content_of_name(name)) for name in "ABCR")),
)
SCENARIOS = {
    "commit": COMMIT,
    "without faults": dataclasses.replace(COMMIT, rules=NO_FAULTS),
    "three drivers": dataclasses.replace(DIFFERENT, skews=(0.0, 0.0, 0.0)),
    "three contenders": Scenario(program=contender, skews=(0.0, 0.0, 0.0), refusals=REFUSALS),
}


@pytest.fixture(autouse=True)
def processes(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate_processes(monkeypatch)


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as threads:
        yield threads


def require_no_bug(found: Exploration) -> None:
    assert not found.violation, str(found)


# The project's own code


def test_publication_ten_thousand_interleavings_keep_every_invariant(
    pool: ThreadPoolExecutor, record_property: Callable[[str, object], None]
) -> None:
    num_interleavings = 0
    for name, scenario in SCENARIOS.items():
        found = Explorer(scenario, pool).explore(NUM_RUNS[name])
        require_no_bug(found)
        num_interleavings += len(found.interleavings)
    record_property("interleavings", num_interleavings)
    assert num_interleavings >= MIN_INTERLEAVINGS


def test_publication_processes_of_one_machine_keep_every_invariant(
    monkeypatch: pytest.MonkeyPatch, pool: ThreadPoolExecutor
) -> None:
    simulate_processes(monkeypatch, same_machine=True)
    require_no_bug(Explorer(COMMIT, pool).explore(500))


def test_merge_keeps_every_invariant(monkeypatch: pytest.MonkeyPatch, pool: ThreadPoolExecutor) -> None:
    simulate_storage_of_merges(monkeypatch)
    scenario = dataclasses.replace(
        COMMIT, program=merger(build_plan()), finished=finished_with(digest_of_content(MEAN))
    )
    require_no_bug(Explorer(scenario, pool).explore(1000))


@pytest.mark.parametrize("rules", [Rules(), NO_FAULTS], ids=["faults", "no faults"])
def test_step_record_keeps_every_invariant(
    rules: Rules, monkeypatch: pytest.MonkeyPatch, pool: ThreadPoolExecutor
) -> None:
    simulate_upkeep(monkeypatch)
    scenario = dataclasses.replace(COMMIT, program=recorder(Steps()), rules=rules)
    require_no_bug(Explorer(scenario, pool).explore(1000))


def test_collection_beside_a_snapshot_keeps_every_invariant(
    monkeypatch: pytest.MonkeyPatch, pool: ThreadPoolExecutor
) -> None:
    simulate_upkeep(monkeypatch)
    objects = left_behind(publisher(Steps(commit=break_off)), pool)
    require_no_bug(Explorer(beside_a_collector(publisher(Steps()), objects), pool).explore(1000, full_depth=3))


def test_collection_beside_a_merge_keeps_every_invariant(
    monkeypatch: pytest.MonkeyPatch, pool: ThreadPoolExecutor
) -> None:
    simulate_upkeep(monkeypatch)
    simulate_storage_of_merges(monkeypatch)
    plan = build_plan()
    objects = left_behind(broken_off(plan), pool)
    scenario = beside_a_collector(merger(plan), objects)
    scenario = dataclasses.replace(scenario, finished=finished_with(digest_of_content(MEAN)))
    require_no_bug(Explorer(scenario, pool).explore(1000, full_depth=3))


def beside_a_collector(program: Callable[[Driver], object], objects: dict[str, bytes]) -> Scenario:
    """A day after an attempt broke off, one driver makes it anew and a collector wants to remove it; nobody fails."""
    return dataclasses.replace(
        COMMIT,
        program=lambda driver: (collector if driver.name == "B" else program)(driver),
        rules=NOTHING_HAPPENS,
        objects=objects,
        starts=START + 25 * 3600,
    )


def test_exploration_twice_is_the_same(pool: ThreadPoolExecutor) -> None:
    first, second = (Explorer(COMMIT, pool).explore(300) for _ in range(2))
    assert first == second
    assert first.num_runs == 300


# Clocks


@pytest.mark.parametrize("skew", [-SKEW_LIMIT_SECONDS + 0.1, 5.0, SKEW_LIMIT_SECONDS - 0.1])
def test_lease_renewed_on_time_skew_below_the_limit_is_never_taken_over(skew: float, pool: ThreadPoolExecutor) -> None:
    require_no_bug(Explorer(contenders(skew), pool).explore(2000, full_depth=3))


@pytest.mark.parametrize("skew", [-SKEW_LIMIT_SECONDS, SKEW_LIMIT_SECONDS])
def test_lease_renewed_on_time_skew_at_the_limit_is_taken_over(skew: float, pool: ThreadPoolExecutor) -> None:
    found = Explorer(contenders(skew), pool).explore(BUDGET, full_depth=2)
    assert "held it for 20 s more by its own clock" in found.violation


def test_publication_skew_beyond_the_limit_damages_nothing(pool: ThreadPoolExecutor) -> None:
    """Who publishes changes then; what is published does not: the token is compared, not the clock alone."""
    scenario = dataclasses.replace(DIFFERENT, skews=(0.0, 10 * EXPIRY_SECONDS), watch_leases=False)
    require_no_bug(Explorer(scenario, pool).explore(1000))


def contenders(skew: float) -> Scenario:
    return Scenario(program=contender, skews=(0.0, skew), rules=ON_TIME, refusals=REFUSALS)


# Planted bugs


@pytest.mark.parametrize(
    ("bug", "rules", "says"),
    [
        ({"check": planted.never_check}, Rules(), NOT_ITS_OWN),
        ({"check": planted.check_token_only}, Rules(), NOT_ITS_OWN),
        ({"check": planted.check_by_a_clock_read_before}, Rules(), NOT_ITS_OWN),
        ({"commit": planted.commit_without_second_check}, Rules(), NOT_ITS_OWN),
        ({"commit": planted.commit_by_put}, Rules(), "changed a published manifest by put"),
        ({"commit": planted.commit_if_it_does_not_exist}, Rules(), "changed a published manifest by put"),
        ({"write": planted.describe_shard, "commit": planted.commit_before_shard}, Rules(), "is not there"),
        ({"write": planted.overwrite_shard}, Rules(), "with another digest"),
        ({"write": planted.write_shard_once}, Rules(), "ended with ObjectExists"),
        ({"side_files": planted.put_side_files}, Rules(), INDEX_DIFFERS),
        ({"commit": planted.commit_leaving_the_index}, NO_FAULTS, INDEX_DIFFERS),
        ({"clean": planted.remove_leftovers}, Rules(), "is listed in a published manifest and is not there"),
        ({"clean": planted.remove_leftovers_checking}, NO_FAULTS, "is listed in a published manifest"),
    ],
    ids=lambda value: "-".join(step.__name__ for step in value.values()) if isinstance(value, dict) else "",
)
def test_planted_bug_in_publication_is_found(
    bug: dict[str, Any], rules: Rules, says: str, pool: ThreadPoolExecutor
) -> None:
    steps = Steps(**{"content": planted.content_of_driver, **bug})
    require_found(dataclasses.replace(DIFFERENT, program=publisher(steps), rules=rules), says, pool)


@pytest.mark.parametrize(
    "bug", [planted.TakesOverByPut, planted.RenewsByPut, planted.ReleasesByPut, planted.RemovesAfterRelease]
)
def test_planted_bug_in_the_lease_is_found(
    bug: type[Lease], monkeypatch: pytest.MonkeyPatch, pool: ThreadPoolExecutor
) -> None:
    monkeypatch.setattr("cluster.lease.Lease", bug)
    require_found(SCENARIOS["three contenders"], "by its own clock", pool)


def test_planted_bug_a_lease_that_never_expires_is_found(
    monkeypatch: pytest.MonkeyPatch, pool: ThreadPoolExecutor
) -> None:
    monkeypatch.setattr("cluster.lease.is_free", lambda held, _: held.released)
    require_found(COMMIT, "working alone, ended with LeaseHeld", pool)


def test_trace_of_a_planted_bug_tells_who_did_what(pool: ThreadPoolExecutor) -> None:
    found = Explorer(dataclasses.replace(COMMIT, program=publisher(Steps(commit=planted.commit_by_put))), pool)
    lines = found.explore(BUDGET).trace.splitlines()
    assert lines[0] == " A create leases/run.json -> created"
    assert " A PAUSES before put snapshots/step-000000001/manifest.json -> B goes on" in lines
    assert lines[-1] == " A put snapshots/step-000000001/manifest.json"


def require_found(scenario: Scenario, says: str, pool: ThreadPoolExecutor) -> None:
    found = Explorer(scenario, pool).explore(BUDGET)
    assert says in found.violation
    assert found.trace
