"""Drivers that record durable steps, and collectors that remove what stopped writers left."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
from simulation.drivers import SAME_CONTENT, SNAPSHOT, Steps, hold, publish
from simulation.explore import NOTHING_HAPPENS, announce
from simulation.store import SimulatedStore
from simulation.world import Driver, World

from cluster.errors import LeaseLost
from cluster.lease import Lease
from cluster.storage import Store
from pipelines.steps import Step, StepRecord, run_steps
from tasks.checkpoints.attempts import find_attempts, remove_attempts
from tasks.checkpoints.manifest import MANIFEST_KEY
from tasks.checkpoints.pins import GC_LEASE
from tasks.checkpoints.run_folder import RUN_KEY


def recorder(steps: Steps) -> Callable[[Driver], object]:
    """The program of a driver that makes a snapshot as a durable step."""

    def program(driver: Driver) -> dict[str, StepRecord]:
        root = SimulatedStore(driver.world)
        with hold(root, driver) as lease:
            return run_steps(root, [durable_step(root, lease, steps)], None, lease)

    return program


def durable_step(root: Store, lease: Lease, steps: Steps) -> Step[None]:
    """The step whose output is the snapshot."""
    store = root.child(SNAPSHOT)

    def train(_: None) -> Mapping[str, Any]:
        if not store.exists(MANIFEST_KEY):
            publish(store, lease, steps, SAME_CONTENT)
        return {}

    return Step(name="train", config={"tokens": 1}, function=train, is_standing=lambda *_: store.exists(MANIFEST_KEY))


def collector(driver: Driver) -> None:
    """Looks for what stopped writers left, and removes what has not changed for long enough."""
    root = SimulatedStore(driver.world)
    with hold(root, driver, GC_LEASE) as lease:
        remove_attempts(root, find_attempts(root, (), driver.clock()), lease)


def break_off(*_: object) -> NoReturn:
    """Stands in for the commit of a driver that stops right before."""
    raise LeaseLost


def left_behind(program: Callable[[Driver], object], pool: ThreadPoolExecutor) -> dict[str, bytes]:
    """What is in a run where ``program`` broke off, and a collector has seen that it did."""
    objects = {RUN_KEY: b"{}"}
    for each in (program, collector):
        world = World({}, NOTHING_HAPPENS, skews=(0.0,), objects=objects)
        announce(world)
        world.run(each, pool)
    return objects


def simulate_upkeep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Delete one object after another, where the scheduler sees it, and take time out of records."""
    monkeypatch.setattr("tasks.checkpoints.attempts.fan_out_local", call_in_order)
    monkeypatch.setattr("pipelines.steps.time", SimpleNamespace(perf_counter=lambda: 0.0, time=lambda: 0.0))
    monkeypatch.setattr("pipelines.steps.code_version", lambda: "simulated")


def call_in_order(function: Callable[[Any], Any], items: Iterable[Any], *, num_workers: int) -> Iterable[Any]:
    """Calls in the driver's own thread."""
    return [function(item) for item in items]
