"""A store, a clock and a lease that is held."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from cluster.lease import Lease
from cluster.storage import Store, open_store
from tests.lease_parts import NAME, Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return open_store(str(tmp_path) if request.param == "local" else f"memory://{uuid.uuid4().hex}")


@pytest.fixture
def lease(store: Store, clock: Clock) -> Lease:
    """A lease that is held."""
    held = Lease(store, NAME, clock)
    held.acquire()
    return held
