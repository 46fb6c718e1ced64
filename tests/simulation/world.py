"""One simulated run: drivers on threads of which only one ever runs, and a scheduler that decides at every storage call.

Before each storage call of a driver the scheduler chooses one :class:`Move`: let it happen, let another
driver go first, let time pass, kill the driver, lose the request or its answer. A run is therefore
a function of its choices alone, and the same choices give the same run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

from cluster.errors import LeaseLost
from cluster.lease import Lease

START = 1_000_000.0
WRITES = ("create", "put", "replace", "delete")


class Crashed(BaseException):
    """The driver's process is gone: nothing it does from here on has an effect."""


class Violation(Exception):
    """An invariant does not hold; the trace says how that came about."""


class Watch(Protocol):
    """What looks at every storage call."""

    def before_call(self, driver: Driver) -> None:
        """The call of ``driver`` is about to take effect."""

    def after_write(self, driver: Driver, call: str, key: str, old: bytes | None, new: bytes | None) -> None:
        """The call changed an object from ``old`` to ``new``; None is absent."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What a scheduler may do in a run; every limit counts moves of one kind."""

    crashes: int = 1
    """Drivers that may be killed."""
    losses: int = 1
    """Requests or answers that may be lost."""
    waits: int = 2
    """Times that the clock may jump while every driver stands still."""
    wait_seconds: float = 31.0
    """How far it jumps; by default beyond a lease's expiry."""
    renewals: int = 1
    """Renewals that may happen, each at any moment."""
    on_time: bool = False
    """Every living holder renews before the clock jumps, and no call outlasts two jumps."""


@dataclass(frozen=True)
class Move:
    """One decision of the scheduler."""

    kind: str
    """``go``, ``late answer``, ``switch``, ``stall``, ``wait``, ``renew``, ``crash``, ``lose request``, ``lose answer``."""
    driver: int = -1
    """Whom ``switch`` and ``stall`` let go, and whose lease ``renew`` renews."""


GO = Move("go")


@dataclass(eq=False)
class Driver:
    """One incarnation of a driver process."""

    name: str
    number: int
    world: World
    skew: float
    """Seconds that its clock is ahead."""
    wake: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    lease: Lease | None = None
    """The lease that it holds, from acquisition to release."""
    alive: bool = True
    """False once it was killed."""
    started: bool = False
    """Whether it was ever let go."""
    running: bool = True
    """False once its program has ended, in whatever way."""
    lost_calls: int = 0
    """Requests and answers of its that were lost: it may fail with a storage error."""
    delayed: bool = False
    """Whether the clock has jumped during the call that it makes."""
    num_names: int = 0
    """Random names that it has asked for."""
    held_at_last_call: bool = False
    """Whether its lease was its own when the call before took effect."""
    held_now: bool = False
    """The same of the call that takes effect now."""

    def clock(self) -> float:
        """Unix seconds by its own clock."""
        return self.world.now + self.skew


class World:
    """Objects, clock and drivers of one run."""

    def __init__(
        self,
        choices: Mapping[int, int],
        rules: Rules,
        *,
        skews: Sequence[float],
        names: str = "ABC",
        objects: dict[str, bytes] | None = None,
        now: float = START,
    ) -> None:
        self.choices, self.rules = choices, rules
        self.objects: dict[str, bytes] = {} if objects is None else objects
        self.now = now
        self.drivers = [Driver(names[number], number, self, skew) for number, skew in enumerate(skews)]
        self.current = self.drivers[0]
        self.watch: Watch | None = None
        self.violation: Violation | None = None
        self.options = bytearray()
        """How many moves there were at each decision."""
        self.trace: list[tuple[str, str, str, str]] = []
        """Who, what, on which key, with what result."""
        self._used = dict.fromkeys(("crash", "loss", "wait", "renew"), 0)
        self.inline = False
        """Whether the call is one of a renewal thread."""
        self._done = threading.Semaphore(0)

    def run(self, program: Callable[[Driver], object], pool: ThreadPoolExecutor) -> list[Future[object]]:
        """Run ``program`` once per driver until none is left; how each ended."""
        ends = [pool.submit(self._live, driver, program) for driver in self.drivers]
        self.drivers[0].wake.release()
        self._done.acquire()
        return ends

    def decide(self, call: str, key: str) -> Move:
        """Called by the driver that runs, before each storage call: returns GO or how the call is lost."""
        driver = self.current
        if self.inline:
            return GO
        while True:
            if not driver.alive or self.violation:
                raise Crashed
            move = self._choose(self._moves(driver, call))
            if move.kind in ("go", "late answer", "lose answer", "lose request"):
                driver.delayed = False
                if move.kind.startswith("lose"):
                    self._used["loss"] += 1
                    driver.lost_calls += 1
                return move
            self._make(move, driver, f"before {call}", key)

    def note(self, what: str, key: str = "", result: str = "") -> None:
        """Add a line about the current driver to the trace."""
        self.trace.append((self.current.name, what, key, result))

    def fail(self, message: str) -> None:
        """Stop the run: an invariant is broken."""
        if self.violation is None:
            self.violation = Violation(message)
        raise self.violation

    def _live(self, driver: Driver, program: Callable[[Driver], object]) -> object:
        driver.wake.acquire()
        driver.started = True
        try:
            if self.violation:
                raise Crashed
            return program(driver)
        finally:
            driver.running = False
            self._pass_on()

    def _pass_on(self) -> None:
        waiting = [driver for driver in self.drivers if driver.running]
        if not waiting:
            self._done.release()
            return
        self.current = waiting[0 if self.violation else self._index(len(waiting))]
        self.current.wake.release()

    def _moves(self, driver: Driver, call: str) -> list[Move]:
        others = [other.number for other in self.drivers if other.running and other is not driver]
        moves = [GO]
        left = {kind: getattr(self.rules, limit) - self._used[kind] for kind, limit in _LIMITS.items()}
        if left["wait"] > 0 and not (self.rules.on_time and any(d.delayed for d in self.drivers if d.running)):
            if not self.rules.on_time:
                moves += [Move("stall", number) for number in others]
            moves.append(Move("wait"))
            if call == "read":
                moves.append(Move("late answer"))
        moves += [Move("switch", number) for number in others]
        if left["crash"] > 0:
            moves.append(Move("crash"))
        if left["loss"] > 0 and call in WRITES:
            moves += [Move("lose answer"), Move("lose request")]
        if left["renew"] > 0:
            moves += [Move("renew", other.number) for other in self.drivers if _may_renew(other)]
        return moves

    def _choose(self, moves: list[Move]) -> Move:
        return moves[self._index(len(moves))]

    def _index(self, count: int) -> int:
        chosen = self.choices.get(len(self.options), 0)
        self.options.append(count)
        assert chosen < count, "a choice that this run does not offer"
        return chosen

    def _make(self, move: Move, driver: Driver, when: str, key: str) -> None:
        target = self.drivers[move.driver].name if move.driver >= 0 else ""
        if move.kind == "crash":
            self._used["crash"] += 1
            driver.alive = False
            self.note(f"IS KILLED {when}", key)
            return
        if move.kind == "renew":
            self._used["renew"] += 1
            self._renew(self.drivers[move.driver])
            return
        if move.kind in ("wait", "stall"):
            self.wait()
        if move.kind in ("switch", "stall"):
            self.note(f"PAUSES {when}", key, f"{target} goes on")
            self.current = self.drivers[move.driver]
            self.current.wake.release()
            driver.wake.acquire()

    def wait(self) -> None:
        """Let time pass while everyone stands still."""
        self._used["wait"] += 1
        if self.rules.on_time:
            for driver in self.drivers:
                if _may_renew(driver):
                    self._renew(driver)
        for driver in self.drivers:
            driver.delayed = driver.started
        self.now += self.rules.wait_seconds
        self.note("TIME PASSES", "", f"{self.rules.wait_seconds:g} s")

    def _renew(self, driver: Driver) -> None:
        """What the renewal thread of ``driver`` does, between two calls of whoever runs."""
        before, self.current, self.inline = self.current, driver, True
        try:
            assert driver.lease is not None
            driver.lease.renew()
        except LeaseLost:
            self.note("LEARNS IN ITS RENEWAL THAT THE LEASE IS LOST, and goes on")
        finally:
            self.current, self.inline = before, False


_LIMITS = {"crash": "crashes", "loss": "losses", "wait": "waits", "renew": "renewals"}


def _may_renew(driver: Driver) -> bool:
    return driver.lease is not None and driver.alive and driver.running
