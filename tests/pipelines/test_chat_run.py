"""A run on chat rows from begin to end, without a cluster: training, snapshots, resume, evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from configs.errors import UserError
from pipelines.pretrain import prepare_run
from pipelines.status import status
from tasks.checkpoints.run_folder import RunFolder
from tasks.evaluation.held_out import HeldOutSuite
from tests.chat_data import chat_config, pairs, write_rows
from tests.local_gang import train


def test_run_on_chat_rows_resumes_to_the_same_bits_and_learns_its_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_rows(tmp_path / "rows.jsonl", pairs(120))
    config = chat_config(source, "training.num_workers=1", "schedule.peak_learning_rate=1e-2")
    run = prepare_run(str(tmp_path / "run"), config)
    assert "training: " in (said := capsys.readouterr().err) and "% padding" in said
    train(run, config)
    whole = [(snapshot.step, snapshot.digest, snapshot.manifest.state_digest) for snapshot in run.snapshots()]
    assert [step for step, _, _ in whole] == [5, 10, 15, 20]
    for snapshot in run.snapshots()[1:]:
        (Path(snapshot.url) / "manifest.json").unlink()
    again = RunFolder(run.url)
    train(again, config)
    resumed = RunFolder(run.url)
    assert [(s.step, s.digest, s.manifest.state_digest) for s in resumed.snapshots()] == whole

    first, last = resumed.snapshots()[0], resumed.snapshots()[-1]
    assert "Assistant:" in (Path(last.url) / "chat_template.jinja").read_text()
    assert json.loads((Path(last.url) / "state.json").read_text())["data_position"]["sequences_seen"] == 80
    suite = HeldOutSuite(run.url, config)
    losses = [suite.evaluate(snapshot.url).loss for snapshot in (first, last)]
    assert losses[1] < losses[0]
    shown = status(run.url)
    assert [row["loss"] for row in shown["snapshots"]][-1] == pytest.approx(losses[1])


def test_bad_rows_end_a_run_before_it_is_there(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [*pairs(40), {"prompt": "q", "completion": ""}])
    with pytest.raises(UserError, match=r"rows.jsonl, line 41: message 2 is an empty answer"):
        prepare_run(str(tmp_path / "run"), chat_config(source))
    assert not (tmp_path / "run" / "run.json").exists()
