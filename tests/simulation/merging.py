"""A driver that carries out a real merge of two tiny checkpoints into simulated storage."""

from __future__ import annotations

import struct
import uuid
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from types import SimpleNamespace

import pytest
from simulation.drivers import write_data
from simulation.explore import CURRENT, current_driver
from simulation.store import ROOT, SimulatedStore
from simulation.upkeep import break_off
from simulation.world import Driver

import pipelines.merge
from cluster.lease import Lease, hold_lease
from cluster.storage import Store, open_store
from tasks.checkpoints.reader import open_checkpoint
from tasks.merging.merge import MergeReport, execute_merge
from tasks.merging.methods import MethodChoice
from tasks.merging.plan import plan_merge
from tasks.merging.planned import MergePlan, MergeTask
from tasks.merging.receipt import Receipt

OUTPUT = "merged/sma"
ZEROS, ONES, MEAN = (struct.pack("<2f", value, value) for value in (0.0, 1.0, 0.5))


def build_plan() -> MergePlan:
    """The mean of two checkpoints of one tensor each."""
    urls = [f"memory://{uuid.uuid4().hex}" for _ in range(2)]
    for url, data in zip(urls, (ZEROS, ONES), strict=True):
        write_data(open_store(url), data, "model.safetensors")
        open_store(url).put("config.json", b"{}")
    choice = MethodChoice(method="sma", alpha=None, weights=None)
    return plan_merge([open_checkpoint(url) for url in urls], choice, output_url=f"{ROOT}/{OUTPUT}")


def merger(plan: MergePlan) -> Callable[[Driver], MergeReport]:
    """The program of a driver that merges under the lease of its output, one task after another."""

    def program(driver: Driver) -> MergeReport:
        with pipelines.merge.merge_lease(plan.output_url) as lease:
            driver.lease = lease
            try:
                return execute_merge(plan, run_in_order, lease.check)
            finally:
                driver.lease = None

    return program


def broken_off(plan: MergePlan) -> Callable[[Driver], object]:
    """The program of a driver that stops between the last task of a merge and its publication."""

    def program(_: Driver) -> MergeReport:
        return execute_merge(plan, run_in_order, break_off)

    return program


def run_in_order(execute: Callable[[MergeTask], list[Receipt]], tasks: list[MergeTask]) -> Iterable[list[Receipt]]:
    """Carry out the tasks in the driver's own thread, where the scheduler sees every call."""
    return [execute(task) for task in tasks]


def simulate_storage_of_merges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let merges open simulated storage, and take time and memory out of what they write."""
    for module in ("tasks.merging.merge", "tasks.merging.publish", "tasks.merging.execute", "pipelines.merge"):
        monkeypatch.setattr(f"{module}.open_store", open_simulated)
    monkeypatch.setattr("pipelines.merge.hold_lease", hold_by_own_clock)
    monkeypatch.setattr("tasks.merging.publish.code_version", lambda: "simulated")
    monkeypatch.setattr("tasks.merging.publish.time", SimpleNamespace(time=lambda: 0.0))
    monkeypatch.setattr("tasks.merging.execute.peak_resident_bytes", lambda: 0)


def hold_by_own_clock(store: Store, name: str) -> AbstractContextManager[Lease]:
    """The lease ``name``, by the clock of the driver that asks."""
    return hold_lease(store, name, clock=current_driver().clock)


def open_simulated(url: str) -> Store:
    """Simulated storage below its root, and any other as it is."""
    if url != ROOT and not url.startswith(f"{ROOT}/"):
        return open_store(url)
    root = SimulatedStore(CURRENT[0])
    return root.child(url.removeprefix(f"{ROOT}/")) if url != ROOT else root
