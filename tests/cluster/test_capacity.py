"""A cluster too small for what is asked: refused, waited for, or left to an autoscaler. The real thing is in test_ray_jobs."""

from __future__ import annotations

import logging

import pytest

from cluster import capacity
from cluster.errors import GangFailed
from configs.errors import UserError


@pytest.fixture(autouse=True)
def in_tenths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits a hundred times shorter."""
    monkeypatch.setattr(capacity, "SETTLE_SECONDS", 0.1)
    monkeypatch.setattr(capacity, "RETURN_SECONDS", 0.3)
    monkeypatch.setattr(capacity, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(capacity, "has_autoscaler", lambda: False)


def see(monkeypatch: pytest.MonkeyPatch, *looks: tuple[int, int]) -> None:
    """Let each look at the cluster see the next of ``looks``, (slots, lost nodes), and then the last for ever."""
    left = list(looks)
    monkeypatch.setattr(capacity, "_slots", lambda _: left.pop(0) if len(left) > 1 else left[0])


def test_enough_slots_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    see(monkeypatch, (4, 0))
    capacity.require_cpus(4, "training")


def test_nodes_that_are_still_registering_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    see(monkeypatch, (0, 0), (2, 0), (4, 0))
    capacity.require_cpus(4, "training")


def test_too_few_slots_are_the_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    see(monkeypatch, (3, 0))
    with pytest.raises(UserError, match="training: needs 4 CPUs at once, the cluster has 3"):
        capacity.require_cpus(4, "training")


def test_lost_nodes_that_do_not_come_back_fail_the_gang(monkeypatch: pytest.MonkeyPatch) -> None:
    see(monkeypatch, (3, 1))
    with pytest.raises(GangFailed, match="since 1 node"):
        capacity.require_cpus(4, "training")


def test_autoscaler_is_left_to_bring_nodes(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    see(monkeypatch, (0, 0))
    monkeypatch.setattr(capacity, "has_autoscaler", lambda: True)
    with caplog.at_level(logging.WARNING):
        capacity.require_cpus(4, "training")
    assert "waiting for the autoscaler" in caplog.text


def test_gpus_are_waited_for_and_then_the_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = [0, 1, 2]
    monkeypatch.setattr(capacity, "count_gpus", lambda: counts.pop(0) if len(counts) > 1 else counts[0])
    capacity.require_gpus(2)
    with pytest.raises(UserError, match=r"training.num_workers=4 needs as many GPUs, the cluster has 2; .*device=cpu"):
        capacity.require_gpus(4)
    monkeypatch.setattr(capacity, "has_autoscaler", lambda: True)
    capacity.require_gpus(4)
