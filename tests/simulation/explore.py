"""Many runs of one scenario, no two alike: all with few moves out of turn, then a seeded sample of those with more."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from simulation.invariants import Invariants
from simulation.world import START, Crashed, Driver, Rules, Violation, World

from cluster.errors import StorageError

LONG_AFTER = START + 1_000_000.0
"""When the driver that recovers comes: every lease has expired."""
RESCUER = "R"
NOTHING_HAPPENS = Rules(crashes=0, losses=0, waits=0, renewals=0)
MAX_MISSES = 1000
"""Samples in a row that were there before: then there is nothing more to explore."""
Deviations = tuple[tuple[int, int], ...]
"""At which decision the scheduler chose which move other than the first."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What runs, and what may happen to it."""

    program: Callable[[Driver], object]
    """What every driver does, and the one that recovers."""
    skews: tuple[float, ...] = (0.0, 0.0)
    """Seconds that the clock of each driver is ahead; as many drivers as values."""
    rules: Rules = field(default_factory=Rules)
    """What the scheduler may do."""
    refusals: tuple[type[Exception], ...] = ()
    """Errors by which a driver may rightly give up."""
    objects: Mapping[str, bytes] = field(default_factory=dict)
    """What is in storage at first."""
    starts: float = START
    """The clock at first, in Unix seconds."""
    finished: Callable[[World], str] = lambda _: ""
    """What is wrong with storage after a driver could work alone; empty if nothing."""
    watch_leases: bool = True
    """Whether it is wrong to take a lease that another works under."""


@dataclass
class Exploration:
    """What was explored and found."""

    interleavings: set[int] = field(default_factory=set)
    """Hashes of the traces of complete runs: who did what in which order, with what result."""
    num_runs: int = 0
    """Complete runs, each with choices of its own."""
    num_recoveries: int = 0
    """States from which another driver had to go on alone."""
    violation: str = ""
    """The first broken invariant."""
    trace: str = ""
    """How it came about."""

    def __str__(self) -> str:
        found = f"; {self.violation}\n{self.trace}" if self.violation else ""
        return f"{self.num_runs} runs, {len(self.interleavings)} interleavings, {self.num_recoveries} recoveries{found}"


class Explorer:
    """Runs a scenario again and again until a number of runs, or a violation."""

    def __init__(self, scenario: Scenario, pool: ThreadPoolExecutor) -> None:
        self.scenario, self.pool = scenario, pool
        self.found = Exploration()
        self._explored: list[tuple[Deviations, bytes]] = []
        self._recovered: set[tuple[bool, frozenset[tuple[str, bytes]]]] = set()

    def explore(self, num_runs: int, *, full_depth: int = 1, seed: int = 0) -> Exploration:
        """All runs of up to ``full_depth`` deviations, then a sample of ever deeper ones."""
        for deviations in self._runs_to_make(full_depth, random.Random(seed)):
            self._explored.append((deviations, self._run(deviations)))
            if self.found.violation or self.found.num_runs >= num_runs:
                break
        return self.found

    def _runs_to_make(self, full_depth: int, chance: random.Random) -> Iterator[Deviations]:
        yield ()
        position = 0
        while position < len(self._explored):
            deviations, options = self._explored[position]
            if len(deviations) == full_depth:
                break
            yield from _one_more(deviations, options)
            position += 1
        else:
            return  # no run has more
        known = {deviations for deviations, _ in self._explored}
        num_misses = 0
        while num_misses < MAX_MISSES:
            child = _sample(*chance.choice(self._explored), chance)
            num_misses = num_misses + 1 if child is None or child in known else 0
            if child is not None and not num_misses:
                known.add(child)
                yield child

    def _run(self, deviations: Deviations) -> bytes:
        scenario = self.scenario
        world = World(
            dict(deviations), scenario.rules, skews=scenario.skews, objects=dict(scenario.objects), now=scenario.starts
        )
        watch = self._watch(world)
        ends = world.run(scenario.program, self.pool)
        for driver, end in zip(world.drivers, ends, strict=True):
            self._judge(world, driver, end.exception())
        self.found.num_runs += 1
        self.found.interleavings.add(hash(tuple(world.trace)))
        if not world.violation:
            self._recover(world, another_index=watch.allows_another_index())
        if world.violation:
            self._report(world)
        return bytes(world.options)

    def _judge(self, world: World, driver: Driver, end: BaseException | None) -> None:
        if end is None or isinstance(end, (Crashed, Violation, *self.scenario.refusals)):
            return
        if isinstance(end, StorageError) and driver.lost_calls:
            return
        if world.violation is None:
            world.violation = Violation(f"{driver.name} ended with {type(end).__name__}: {end}")

    def _recover(self, world: World, *, another_index: bool) -> None:
        """Let a fresh driver work alone, long after; a state that was recovered before is known."""
        state = (another_index, frozenset(world.objects.items()))
        if state in self._recovered:
            return
        self._recovered.add(state)
        self.found.num_recoveries += 1
        alone = World(
            {}, NOTHING_HAPPENS, skews=(0.0,), names=RESCUER,
            objects=dict(world.objects), now=LONG_AFTER,
        )  # fmt: skip
        watch = self._watch(alone)
        (end,) = alone.run(self.scenario.program, self.pool)
        if end.exception() and not alone.violation:
            alone.violation = Violation(f"{RESCUER}, working alone, ended with {end.exception()!r}")
        try:
            watch.check_at_rest(another_index=another_index)
            if wrong := self.scenario.finished(alone):
                alone.fail(wrong)
        except Violation:
            pass
        world.violation = alone.violation
        world.trace += alone.trace

    def _watch(self, world: World) -> Invariants:
        announce(world)
        return Invariants(world, watch_leases=self.scenario.watch_leases)

    def _report(self, world: World) -> None:
        self.found.violation = str(world.violation)
        lines = (
            f"{who:>2} {what} {key} {result and '-> ' + result}".rstrip() for who, what, key, result in world.trace
        )
        self.found.trace = "\n".join(lines)


def _one_more(deviations: Deviations, options: bytes) -> Iterator[Deviations]:
    for place in range(_next_place(deviations), len(options)):
        for move in range(1, options[place]):
            yield (*deviations, (place, move))


def _sample(deviations: Deviations, options: bytes, chance: random.Random) -> Deviations | None:
    """A run with one deviation more than the one that had these; None if there is no place for it."""
    places = [place for place in range(_next_place(deviations), len(options)) if options[place] > 1]
    if not places:
        return None
    place = chance.choice(places)
    return (*deviations, (place, chance.randrange(1, options[place])))


def _next_place(deviations: Deviations) -> int:
    return deviations[-1][0] + 1 if deviations else 0


CURRENT: list[World] = []
"""The world that runs now: what stands in for the operating system asks it who is asking."""


def announce(world: World) -> None:
    """Make ``world`` the one that runs now."""
    CURRENT[:] = [world]


def current_driver() -> Driver:
    """The driver that runs now."""
    return CURRENT[0].current
