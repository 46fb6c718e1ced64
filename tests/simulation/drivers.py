"""What drivers do: the project's own code against simulated storage, clock and processes."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from simulation.explore import CURRENT, current_driver
from simulation.invariants import read
from simulation.store import SimulatedStore
from simulation.world import Driver, World

from cluster import lease as lease_module
from cluster.errors import ObjectMissing
from cluster.lease import Lease, read_record
from cluster.storage import Store
from tasks.checkpoints.manifest import (
    MANIFEST_KEY,
    Manifest,
    Shard,
    SideFile,
    model_digest,
    parse_manifest,
    read_manifest,
)
from tasks.checkpoints.safetensors_header import TensorEntry
from tasks.checkpoints.writer import commit_manifest, write_shard, write_side_files

LEASE = "run"
SNAPSHOT = "snapshots/step-000000001"
SAME_CONTENT = b"12345678"
"""Eight bytes of weights."""
KEY = "model-00001-of-00001.safetensors"


def write_data(store: Store, data: bytes, key: str = KEY) -> Shard:
    """One shard of one tensor."""

    def chunks_of(_: TensorEntry) -> list[bytes]:
        return [data]

    return write_shard(store, key, [("w", "F32", (2,))], chunks_of, "model")


def leave_everything(_: Store, __: Lease) -> None:
    """Leftovers of earlier attempts stay where they are."""


def same_content(_: Driver) -> bytes:
    """Weights that every attempt finds anew."""
    return SAME_CONTENT


@dataclass(frozen=True, kw_only=True)
class Steps:
    """The steps of a publication; tests put a planted bug in the place of one."""

    check: Callable[[Lease], Callable[[], None]] = lambda lease: lease.check
    """What is asked right before publishing."""
    write: Callable[[Store, bytes], Shard] = write_data
    """Writes the shard."""
    side_files: Callable[..., tuple[SideFile, ...]] = write_side_files
    """Writes the small files."""
    commit: Callable[[Store, Manifest, Callable[[], None]], Manifest] = commit_manifest
    """Publishes."""
    clean: Callable[[Store, Lease], None] = leave_everything
    """Removes what earlier attempts left."""
    content: Callable[[Driver], bytes] = same_content
    """Eight bytes of weights."""


def publisher(steps: Steps) -> Callable[[Driver], object]:
    """The program of a driver that makes a snapshot under the lease of its run."""

    def program(driver: Driver) -> Manifest:
        root = SimulatedStore(driver.world)
        with hold(root, driver) as lease:
            store = root.child(SNAPSHOT)
            try:
                return read_manifest(store)[0]
            except ObjectMissing:
                steps.clean(store, lease)
            return publish(store, lease, steps, steps.content(driver))

    return program


def publish(store: Store, lease: Lease, steps: Steps, data: bytes) -> Manifest:
    """Shard, side files and manifest, in the order in which training and merging write them."""
    check = steps.check(lease)
    shard = steps.write(store, data)
    files = steps.side_files(store, {"config.json": b"{}"}, [shard], check)
    return steps.commit(store, build_manifest(shard, files), check)


def build_manifest(shard: Shard, files: tuple[SideFile, ...]) -> Manifest:
    """A manifest of one shard."""
    return Manifest(
        kind="training", step=1, tokens_seen=1, digest=model_digest((shard,)), state_digest=None,
        shards=(shard,), files=files, parameter_groups={"all": ["w"]},
    )  # fmt: skip


def contender(driver: Driver) -> None:
    """A driver that takes the lease, checks it twice, and gives it back."""
    with hold(SimulatedStore(driver.world), driver) as lease:
        lease.check()
        lease.check()


@contextmanager
def hold(store: Store, driver: Driver, name: str = LEASE) -> Iterator[Lease]:
    """A lease of the run; the scheduler may renew it meanwhile."""
    with lease_module.hold_lease(store, name, clock=driver.clock) as lease:
        driver.lease = lease
        try:
            yield lease
        finally:
            driver.lease = None


def published(world: World) -> Manifest | None:
    """The manifest that stands at the end."""
    found = [data for key, data in world.objects.items() if key.endswith(MANIFEST_KEY)]
    return read(found[0]) if found else None


class Processes:
    """Stands in for ``psutil.Process``: a driver's process lives until it is killed."""

    def __init__(self, pid: int | None = None) -> None:
        drivers = CURRENT[0].drivers
        self.pid = current_driver().number if pid is None else pid
        if pid is not None and not (pid < len(drivers) and drivers[pid].alive):
            raise NoProcess

    def create_time(self) -> float:
        return 0.0

    def status(self) -> str:
        return "running"


class NoThread:
    """Stands in for the thread that renews a lease: the scheduler renews instead."""

    def __init__(self, **_: object) -> None:
        pass

    def start(self) -> None:
        pass

    def join(self) -> None:
        pass


class NoProcess(Exception):
    """Stands in for ``psutil.NoSuchProcess``."""


def simulate_processes(monkeypatch: pytest.MonkeyPatch, *, same_machine: bool = False) -> None:
    """Give each driver a process, all on one machine or each on its own, and names instead of random numbers."""
    processes = SimpleNamespace(Process=Processes, NoSuchProcess=NoProcess, STATUS_ZOMBIE="zombie")
    monkeypatch.setattr("cluster.lease.psutil", processes)
    monkeypatch.setattr(
        "cluster.lease.machine_identity", lambda: "here" if same_machine else f"machine of {current_driver().name}"
    )
    # No renewal but the scheduler's.
    monkeypatch.setattr("cluster.lease.threading", SimpleNamespace(Event=threading.Event, Thread=NoThread))
    # The same few objects are parsed again and again.
    monkeypatch.setattr("cluster.lease.read_record", functools.cache(read_record))
    monkeypatch.setattr("tasks.checkpoints.manifest.parse_manifest", functools.cache(parse_manifest))
    monkeypatch.setattr("tasks.checkpoints.writer.parse_manifest", functools.cache(parse_manifest))
    monkeypatch.setattr("cluster.lease.getpass", SimpleNamespace(getuser=lambda: "someone"))
    names = SimpleNamespace(token_hex=lambda _: next_name())
    for module in ("cluster.lease", "tasks.checkpoints.writer", "tasks.merging.execute"):
        monkeypatch.setattr(f"{module}.secrets", names)


def next_name() -> str:
    """A name that tells whose it is: no two drivers, and no two calls of a driver, get the same."""
    driver = current_driver()
    driver.num_names += 1
    return f"{driver.name}-{driver.num_names}"
