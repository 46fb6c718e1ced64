"""A rank that does not come to a collective is named by the others."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import FileStore, HashStore

from cluster.lease import hold_lease
from configs.load import load_config
from tasks.checkpoints.run_folder import RUN_LEASE, RunFolder
from tasks.training import roll_call
from tasks.training.roll_call import RollCall
from tests.plain_gang import end_members, start_members

HANG = """
from tasks.training.worker import Worker
import os, signal, time
whole = Worker.train_step
def train_step(self, signals):
    if rank == 1 and self.step == 3:
        self.roll_call.note(self.step, "reading data")
        time.sleep(3600) if {alive} else os.kill(os.getpid(), signal.SIGSTOP)
    return whole(self, signals)
Worker.train_step = train_step
"""


@pytest.mark.parametrize(("alive", "state"), [(True, "its process lives"), (False, "says nothing any more")])
def test_hanging_rank_is_named_with_its_step_and_state(tmp_path: Path, alive: bool, state: str) -> None:
    (tmp_path / "text.txt").write_text("some words to read; " * 400)
    (tmp_path / "more.txt").write_text("other words to read; " * 400)
    overrides = (
        f"data.sources=[{tmp_path}/*.txt]", "data.held_out_fraction=0.5", "model.hidden_size=32", "model.num_layers=1",
        "training.sequence_length=16", "training.batch_tokens=64", "training.total_tokens=6400",
        "snapshots.interval_tokens=640", "schedule.warmup_tokens=640", "anneal.tokens=640",
        "evaluation.slice_tokens=64", "training.collective_timeout_seconds=8",
    )  # fmt: skip
    config, run = load_config("tiny", overrides).config, RunFolder(str(tmp_path / "run"))
    run.begin(config)
    with hold_lease(run.store, RUN_LEASE) as lease:
        first, second = start_members(run, config, lease, 2, tmp_path, prelude=HANG.format(alive=alive))
        (error,) = end_members([first])
        second.kill()
        end_members([second])
    assert first.returncode != 0
    said = error.strip().splitlines()[-1]
    assert "RankHung: a rank did not come to a collective in time: rank 1 on" in said
    assert state in said
    # A stopped process is known by what it said last, up to a second before.
    assert not alive or "stands at step 3 (reading data)" in said


def test_other_errors_are_not_explained(tmp_path: Path) -> None:
    call = RollCall(FileStore(str(tmp_path / "store"), 1), 0, 1)
    assert call.explain(ValueError("timed out")) is None
    assert call.explain(RuntimeError("connection closed by peer")) is None
    call.end()


def test_rank_that_never_spoke_and_one_that_is_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roll_call, "LISTEN_SECONDS", 2.5)
    store = HashStore()
    store.set_timeout(timedelta(seconds=5))
    calls = [RollCall(store, rank, 3) for rank in range(2)]
    calls[0].note(7, "in forward and backward")
    calls[1].note(7, "reading data")
    hung = calls[0].explain(RuntimeError("Timed out waiting 8000ms for recv operation to complete"))
    assert "rank 2 never said anything" in str(hung)
    calls.append(RollCall(store, 2, 3))
    calls[2].note(7, "in forward and backward")
    hung = calls[0].explain(RuntimeError("Timed out waiting 8000ms for recv operation to complete"))
    assert "rank 1 on" in str(hung) and "reading data" in str(hung) and "rank 2" not in str(hung)
    for call in calls:
        call.end()
