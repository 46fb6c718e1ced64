"""Ranks killed at random moments, many times over: no half-visible snapshot, and the same final weights."""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.lease import hold_lease
from configs.load import load_config
from configs.schema import Config
from tasks.checkpoints.run_folder import RUN_LEASE, RunFolder
from tasks.merging.verify import verify_checkpoint
from tests.plain_gang import end_members, start_members, train_plainly, watch_members
from tests.token_data import write_text

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]
NUM_KILLS = int(os.environ.get("PMA_KILLS", "32"))
"""Eight more, of drivers and controllers on Ray, are in tests/pipelines/test_random_kills.py."""
LONGEST_SECONDS = 0.8
"""From the first sign of training to a kill at a random moment."""
Moment = Callable[[], bool]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A long run of short steps, with a snapshot every eight."""
    text = write_text(tmp_path / "text", count=12, repeats=60)
    overrides = (
        f"data.sources=[{text}]", "data.held_out_fraction=0.3", "model.hidden_size=32", "model.num_layers=1",
        "training.sequence_length=16", "training.batch_tokens=64", "training.total_tokens=102400",
        "snapshots.interval_tokens=512", "schedule.warmup_tokens=512", "anneal.tokens=512",
        "evaluation.slice_tokens=64", "optimizer.guard=zclip", "training.collective_timeout_seconds=20",
    )  # fmt: skip
    return load_config("tiny", overrides).config


def test_kills_of_one_or_all_ranks_end_in_the_same_bytes(config: Config, tmp_path: Path) -> None:
    whole, broken = RunFolder(str(tmp_path / "whole")), RunFolder(str(tmp_path / "broken"))
    for run in (whole, broken):
        run.begin(config)
    with hold_lease(whole.store, RUN_LEASE) as lease:
        train_plainly(whole, config, lease, 2, tmp_path)

    draws = random.Random(5)
    kills: dict[str, int] = {}
    with hold_lease(broken.store, RUN_LEASE) as lease:
        while sum(kills.values()) < NUM_KILLS:
            kind = ("at random", "in an upload", "after a commit")[sum(kills.values()) % 3]
            members = start_members(broken, config, lease, 2, tmp_path)
            if watch_members(members, _moment(kind, broken, draws)):
                _kill(members, draws.choice(["one rank", "all ranks"]), draws)
                kills[kind] = kills.get(kind, 0) + 1
            end_members(members)
            assert broken.snapshots() == [] or broken.snapshots()[-1].step < 1600, (
                "it ended before it was killed enough"
            )
            _require_whole_snapshots(broken)
        train_plainly(broken, config, lease, 2, tmp_path)

    assert min(kills.values()) >= NUM_KILLS // 3
    expected = {s.step: (s.digest, s.manifest.state_digest) for s in whole.snapshots()}
    assert {s.step: (s.digest, s.manifest.state_digest) for s in broken.snapshots()} == expected
    assert broken.snapshots()[-1].step == 1600


def _moment(kind: str, run: RunFolder, draws: random.Random) -> Moment:
    """When to kill: some time after training began, while a snapshot has objects and no manifest, or once it has one."""
    folder, segments = Path(run.url) / "snapshots", _segments(run)
    skip = draws.randrange(1, 4)
    before = len(list(folder.glob("*/manifest.json")))
    if kind == "at random":
        started: list[float] = []
        wait = draws.uniform(0, LONGEST_SECONDS)

        def is_time() -> bool:
            if not started and _segments(run) > segments:
                started.append(time.monotonic())
            return bool(started) and time.monotonic() - started[0] > wait

        return is_time
    if kind == "in an upload":
        return lambda: (
            len(list(folder.glob("*/manifest.json"))) >= before + skip
            and any(not (path / "manifest.json").exists() for path in folder.glob("*"))
        )
    return lambda: len(list(folder.glob("*/manifest.json"))) >= before + skip


def _segments(run: RunFolder) -> int:
    return len(list((Path(run.url) / "segments").glob("*.json")))


def _kill(members: list[subprocess.Popen[str]], what: str, draws: random.Random) -> None:
    for member in members if what == "all ranks" else [draws.choice(members)]:
        member.kill()


def _require_whole_snapshots(run: RunFolder) -> None:
    """Whatever has a manifest is complete to the last byte."""
    for snapshot in run.snapshots()[-3:]:
        verification = verify_checkpoint(snapshot.url)
        assert not verification.problems, (snapshot.url, verification.problems)
