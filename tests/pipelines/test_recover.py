"""The loop around a spike: alarm, merge, record, next segment; by itself and by hand, with deaths in between."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import LeaseHeld
from cluster.gang import WorkerLost
from cluster.journal import read_events
from configs.errors import UserError
from configs.schema import Config
from pipelines import recover as recover_pipeline
from pipelines.gangs import train_to_end
from pipelines.gc import survey
from pipelines.pretrain import start_point
from pipelines.recover import recover
from pipelines.run_lease import hold_run
from pipelines.status import status
from pipelines.verify import verify
from tasks.checkpoints.reader import open_checkpoint
from tasks.checkpoints.recoveries import read_confirmations
from tasks.checkpoints.run_folder import RunFolder
from tasks.recovery.policy import SpikeUnanswered, Wish
from tests.local_gang import local_means, start_gang, train
from tests.short_run import NAN_AT_45, begin, small


def folders(run: RunFolder) -> list[str]:
    """Names of the living snapshots."""
    return [snapshot.url.rpartition("/")[2] for snapshot in run.snapshots()]


@pytest.fixture(scope="module")
def recovered(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run whose weights became NaN once, trained to its end without a human."""
    run, config = begin(tmp_path_factory.mktemp("run") / "nan", *NAN_AT_45)
    train(run, config)
    return run


def test_corrupted_weights_are_answered_with_a_merge_and_training_ends(recovered: RunFolder) -> None:
    (recovery,) = recovered.recoveries()
    assert (recovery.onset_step, recovery.alarm_step, recovery.start.step, recovery.count) == (46, 46, 40, 3)
    assert recovered.snapshots()[-1].step == 80
    assert folders(recovered)[3:5] == ["step-000000040", "step-000000050-r01"]
    assert all(snapshot.healthy for snapshot in recovered.snapshots())
    merged = open_checkpoint(recovery.start.url).manifest
    assert merged is not None and merged.merge is not None
    assert [item.step for item in merged.merge.inputs] == [20, 30, 40]
    assert merged.merge.policies["optimizer_moments"] == "merge"
    assert verify(recovery.start.url)["ok"]
    assert read_confirmations(recovered.store)[1]["step"] == recovery.confirm_step == 66


def test_every_decision_is_on_record(recovered: RunFolder) -> None:
    first, second = recovered.segments()
    assert first["end"]["reason"] == "spike" and first["end"]["alarm"]["kind"] == "nonfinite"
    assert (second["cause"], second["start"]["step"], second["plan"]["recovery"]) == ("recovery 1", 40, 1)
    assert second["plan"]["rewarm_tokens"] == 640 and second["end"]["reason"] == "completed"
    kinds = [event["kind"] for event in read_events(recovered.store)]
    assert [kind for kind in kinds if kind in ("spike", "recovery", "recovered")] == ["spike", "recovery", "recovered"]
    scalars = json.loads(recovered.store.read("snapshots/step-000000050-r01/state.json"))
    assert scalars["recovery"] == 1
    assert scalars["course"]["skips"] == [{"at": 160, "count": 24}]  # Steps 40 to 46 of 4 sequences.
    assert (scalars["course"]["learning_rate_scale"], scalars["course"]["rewarm_tokens"]) == (1.0, 640)
    assert scalars["optimizer"]["steps"] == 50


def test_recovery_is_the_same_bytes_when_repeated(recovered: RunFolder, tmp_path: Path) -> None:
    run, config = begin(tmp_path / "again", *NAN_AT_45)
    train(run, config)
    assert [s.digest for s in run.snapshots()] == [s.digest for s in recovered.snapshots()]
    assert [s.manifest.state_digest for s in run.snapshots()] == [
        s.manifest.state_digest for s in recovered.snapshots()
    ]


def test_driver_that_dies_between_merge_and_record_decides_the_same(
    recovered: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, config = begin(tmp_path / "died", *NAN_AT_45)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(recover_pipeline, "write_recovery", die)
        with pytest.raises(KeyboardInterrupt):
            train(run, config)
    assert run.recoveries() == [] and len(run.merged()) == 1
    train(run, config)
    assert [s.digest for s in run.snapshots()] == [s.digest for s in recovered.snapshots()]
    assert run.recoveries()[0].start.digest == recovered.recoveries()[0].start.digest


def test_gangs_that_die_around_a_recovery_are_followed_by_the_same_run(recovered: RunFolder, tmp_path: Path) -> None:
    """One gang dies before the spike, one when the recovered segment has published nothing, one after it has."""
    run, config = begin(tmp_path / "lost", *NAN_AT_45, "training.max_restarts=2")
    deaths = iter([23, None, 47, 58, None])

    def mortal(task: Any, config: Config, name: str, on_wait: Callable[[], object]) -> dict[str, Any]:
        death = next(deaths)
        if death is None:
            return start_gang(task, config, name, on_wait)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("tasks.training.worker.Worker.train_step", _dying(death))
            return start_gang(task, config, name, on_wait)

    with hold_run(run) as lease:
        train_to_end(run, config, lease, replace(local_means(), start_gang=mortal))
    assert [s.digest for s in run.snapshots()] == [s.digest for s in recovered.snapshots()]
    causes = [segment["cause"] for segment in run.segments()]
    assert causes == ["start", "worker lost", "recovery 1", "worker lost", "worker lost"], causes


def _dying(step: int) -> Any:
    from tasks.training.worker import Worker

    whole = Worker.train_step

    def train_step(self: Worker, *arguments: Any) -> Any:
        if self.step == step:
            raise WorkerLost(f"killed at step {step}", RuntimeError("killed"))
        return whole(self, *arguments)

    return train_step


def test_nan_at_the_first_step_ends_with_what_to_do(tmp_path: Path) -> None:
    run, config = begin(tmp_path / "first", "drill.corruption=nan-weights", "drill.corruption_step=0")
    with pytest.raises(SpikeUnanswered, match=r"loss is nan at step 1; there is no healthy snapshot"):
        train(run, config)
    assert run.snapshots() == [] and run.recoveries() == []


def test_policy_stop_leaves_the_way_back_to_a_human(tmp_path: Path) -> None:
    run, config = begin(tmp_path / "stop", *NAN_AT_45, "recovery.policy=stop")
    for _ in range(2):  # The second time before anything starts.
        with pytest.raises(SpikeUnanswered, match=r"recovery\.policy=stop asks to end here"):
            train(run, config)
    assert len(run.segments()) == 1
    answer = recover(run.url, Wish(count=2, moments="reset"))
    assert (answer["recovery"], answer["start_step"], answer["alarm_step"], answer["policy"]) == (1, 40, 46, "by hand")
    train(run, config)
    assert run.snapshots()[-1].step == 80
    scalars = json.loads(run.store.read("snapshots/step-000000050-r01/state.json"))
    assert scalars["optimizer"]["steps"] == 10  # Moments began anew at step 40.


def test_policy_ignore_trains_on_with_nan(tmp_path: Path) -> None:
    run, config = begin(tmp_path / "ignore", *NAN_AT_45, "recovery.policy=ignore")
    train(run, config)
    assert len(run.segments()) == 1
    assert [s.healthy for s in run.snapshots()] == [True] * 4 + [False] * 4


@pytest.fixture
def finished(tmp_path: Path) -> tuple[RunFolder, Config]:
    """A run without trouble."""
    run, config = begin(tmp_path / "plain")
    train(run, config)
    return run, config


def test_recover_by_hand_leaves_later_snapshots_behind(finished: tuple[RunFolder, Config]) -> None:
    run, config = finished
    before = {s.url: s.digest for s in run.snapshots()}
    recover(run.url, Wish(count=1), onset=46)
    assert folders(run) == ["step-000000010", "step-000000020", "step-000000030", "step-000000040"]
    train(run, config)
    assert folders(run)[4:] == [f"step-{step:09d}-r01" for step in (50, 60, 70, 80)]
    assert {s.url: s.digest for s in run.all_snapshots()}.items() >= before.items()  # Nothing is overwritten or lost.
    result = status(run.url)
    assert [row["step"] for row in result["snapshots"]] == [10, 20, 30, 40, 50, 60, 70, 80]
    assert [row["step"] for row in result["left_behind"]] == [50, 60, 70, 80]
    assert [row["number"] for row in result["recoveries"]] == [1]


def test_retention_gives_away_what_was_left_behind_first(finished: tuple[RunFolder, Config]) -> None:
    run, config = finished
    recover(run.url, Wish(count=1), onset=46)
    kept = replace(config, retention=replace(config.retention, keep_last=100))
    plan = {row.name: row for row in survey(run, kept, now=0.0).rows}
    assert plan["snapshots/step-000000060"].reasons == ("left behind by a recovery",)
    assert plan["snapshots/step-000000040"].action == "keep"
    assert all(row.action == "keep" for row in survey(run, config, now=0.0).rows)  # No rule, nothing goes.


def test_recover_command_refuses_before_anything_is_written(finished: tuple[RunFolder, Config]) -> None:
    run, _ = finished
    with pytest.raises(UserError, match=r"no spike is on record and the detector finds none"):
        recover(run.url, Wish())
    with pytest.raises(UserError, match=r"--onset 900: the run stands at step 80"):
        recover(run.url, Wish(), onset=900)
    with pytest.raises(UserError, match=r"--onset 15 leaves 0 healthy snapshots"):
        recover(run.url, Wish(), onset=15)
    with hold_run(run), pytest.raises(LeaseHeld):
        recover(run.url, Wish(), onset=46)
    assert recover(run.url, Wish(), onset=46, dry_run=True)["start_step"] == 40
    assert run.recoveries() == [] and run.merged() == {}


def test_branch_of_a_recovered_run_keeps_its_course(recovered: RunFolder, tmp_path: Path) -> None:
    """A fork reads on where its run would have: neither what was skipped nor at another learning rate."""
    start = start_point(recovered, 60)
    branch, config = RunFolder(f"{recovered.url}/branches/same"), small(*NAN_AT_45)
    branch.begin(config, start)
    train(branch, config)
    mine, theirs = branch.snapshots(), recovered.snapshots()[-2:]
    assert [(s.step, s.digest) for s in mine] == [(s.step, s.digest) for s in theirs]
    scalars = json.loads(branch.store.read("snapshots/step-000000070/state.json"))
    assert scalars["course"]["skips"] == [{"at": 160, "count": 24}]


def test_segment_of_a_branch_records_the_course_that_it_inherited(finished: tuple[RunFolder, Config]) -> None:
    run, config = finished
    recover(run.url, Wish(count=1, learning_rate_scale=0.5, rewarm_tokens=256), onset=46)
    train(run, config)
    branch = RunFolder(f"{run.url}/branches/same")
    branch.begin(config, start_point(run, 60))
    train(branch, config)
    (ours,), theirs = branch.segments(), run.segments()[-1]
    inherited = ("learning_rate_scale", "rewarm_tokens", "data")
    assert [theirs["plan"][key] for key in inherited] == [0.5, 256, "continued, with stretches skipped"]
    assert [ours["plan"][key] for key in inherited] == [theirs["plan"][key] for key in inherited]
    assert ours["plan"]["recovery"] == 0  # The branch itself has none.


def test_trained_run_is_not_trained_any_more_after_a_recovery(finished: tuple[RunFolder, Config]) -> None:
    run, config = finished
    recover(run.url, Wish(count=3), onset=78)
    assert not run.snapshots()[-1].step >= config.training.total_steps
    assert run.snapshots()[-1].step == 70


def test_mlflow_is_annotated_with_spike_and_recovery_once(recovered: RunFolder, pma: Callable[..., Any]) -> None:
    for _ in range(2):
        answer = pma("status", "--run", recovered.url, "--json")
        assert answer.json["tracking"]["error"] is None and answer.json["tracking"]["lag"] == 0, answer.stderr
    with sqlite3.connect(f"{recovered.url}/mlflow.db") as db:
        tags = dict(db.execute("select key, value from tags where key like 'pma.%.%'").fetchall())
        points = db.execute("select step, value from metrics where key = 'recovery/recovery_count'").fetchall()
    assert {key.split(".")[1] for key in tags} == {"spike", "recovery", "recovered"} and len(tags) == 3
    assert any("loss is nan at step 46" in text for text in tags.values())
    assert points == [(40 * 128, 1.0)]
