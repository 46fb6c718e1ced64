"""``pma plan``: what a pipeline has left to do, told without doing any of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.journal import JournalWriter, write_event
from cluster.lease import Lease
from cluster.storage import Store
from configs.errors import UserError
from configs.load import load_config
from configs.merging import MergeConfig
from pipelines.driven import Driven
from pipelines.plan import draw_mermaid, plan, rows_of
from pipelines.pretrain import pretrain_steps
from pipelines.render_schedule import render_plan
from pipelines.steps import run_steps
from tasks.checkpoints.run_folder import RunFolder
from tests.retention_run import BATCH, make_run, small_config

CONFIG = small_config(steps=10, merge=MergeConfig(count=3, evaluate=False))
MODEL_BYTES = 40
"""Of :func:`tests.retention_run.commit`: 4 and 6 float32 values, without their files' headers."""


@pytest.fixture
def half(tmp_path: Path) -> Store:
    """A run of 10 steps, 5 of which are trained."""
    return make_run(str(tmp_path / "run"), range(1, 6), CONFIG)


def by_name(answer: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["step"]: row for row in answer["steps"]}


def test_plan_of_a_new_demo_counts_every_piece_and_writes_nothing(tmp_path: Path, small: tuple[str, ...]) -> None:
    answer = plan("demo", load_config("tiny", small).config, str(tmp_path / "run"))
    rows = {name: (row["state"], row["units_done"], row["units"]) for name, row in by_name(answer).items()}
    assert rows == {
        "train": ("due", 0, 16),
        "merge": ("blocked", 0, 14),
        "evaluate": ("blocked", 0, 30),
        "anneal-from-step-000000300/train": ("blocked", 0, 4),
        "anneal-from-step-000000300/evaluate": ("blocked", 0, 4),
        "compare": ("blocked", 0, 4),
    }
    assert answer["seconds"] is None
    assert list(tmp_path.iterdir()) == []


def test_plan_knows_the_size_of_a_model_before_its_first_snapshot(tmp_path: Path, small: tuple[str, ...]) -> None:
    rows = by_name(plan("pretrain", load_config("tiny", small).config, str(tmp_path / "run")))
    attention, norms, router, experts = 2 * 64 * 64 + 2 * 32 * 64, 2 * 64 + 2 * 16, 8 * 64, 8 * 3 * 64 * 64
    parameters = 2 * 256 * 64 + 64 + 2 * (attention + norms + router + experts)
    assert rows["train"]["bytes_written"] == 16 * 3 * 4 * parameters
    assert rows["merge"]["bytes_read"] == 14 * 3 * 4 * parameters


def test_plan_of_a_run_under_way_counts_what_is_left(half: Store) -> None:
    rows = by_name(plan("pretrain", CONFIG, half.url))
    assert (rows["train"]["state"], rows["train"]["units_done"], rows["train"]["units"]) == ("due", 5, 10)
    assert (rows["merge"]["state"], rows["merge"]["units"]) == ("blocked", 8)
    size = rows["merge"]["bytes_written"] // 8
    assert size > MODEL_BYTES
    assert rows["merge"]["bytes_read"] == 8 * 3 * size


def test_plan_estimates_from_what_the_run_measured(half: Store) -> None:
    assert by_name(plan("pretrain", CONFIG, half.url))["train"]["seconds"] is None
    writer = JournalWriter(half, 1)
    for step, speed in enumerate((1.0, 50.0, 50.0), start=3):
        writer.log(step, step * BATCH, {"train/tokens_per_second": speed})
    writer.flush()
    write_event(half, "merge", {"name": "m", "bytes_read": 100, "seconds": 2.0})
    rows = by_name(plan("pretrain", CONFIG, half.url))
    assert rows["train"]["seconds"] == 5 * BATCH / 50.0
    assert rows["merge"]["seconds"] == pytest.approx(rows["merge"]["bytes_read"] / 50.0, abs=0.1)


def test_plan_of_a_finished_run_has_nothing_left(demo_run: tuple[Path, dict[str, Any]], small: tuple[str, ...]) -> None:
    answer = plan("demo", load_config("tiny", small).config, str(demo_run[0]))
    assert {row["state"] for row in answer["steps"]} == {"done"}
    assert all(row["units_done"] == row["units"] for row in answer["steps"])
    assert (answer["bytes_read"], answer["bytes_written"], answer["seconds"]) == (0, 0, 0.0)


def test_plan_with_other_values_shows_the_difference(half: Store) -> None:
    changed = replace(CONFIG, seed=7)
    with pytest.raises(UserError, match=r"seed: run has 1, asked for 7(.|\n)*--fork NAME"):
        plan("pretrain", changed, half.url)


def test_plan_of_an_unknown_pipeline_names_those_there_are(half: Store) -> None:
    with pytest.raises(UserError, match="there are pretrain, demo"):
        plan("pretain", CONFIG, half.url)


def test_step_that_was_recorded_with_other_values_is_refused(half: Store) -> None:
    """The run's identity agrees; the record of the step was made by a version whose step took other values."""
    run = RunFolder(half.url)
    driven = Driven(run=run, config=CONFIG)
    train, *_ = pretrain_steps(CONFIG)
    older = replace(train, config={**train.config, "optimizer.gone": 1}, function=lambda _: {})
    lease = Lease(half, "run")
    lease.acquire()
    run_steps(half, [older], driven, lease)
    with pytest.raises(UserError, match=r"optimizer\.gone: done with 1, asked for None"):
        plan("pretrain", CONFIG, half.url)


def test_mermaid_draws_every_step_and_need(half: Store) -> None:
    driven = Driven(run=RunFolder(half.url), config=CONFIG)
    rows = rows_of("", driven, pretrain_steps(CONFIG), {}, set())
    lines = draw_mermaid(rows).splitlines()
    assert lines[0] == "flowchart LR"
    assert '  s0["train<br/>5 of 10"]:::due' in lines
    assert [line.strip() for line in lines if "-->" in line] == ["s0 --> s1", "s0 --> s2", "s1 --> s2"]


def test_plan_is_printed_as_a_table(half: Store) -> None:
    text = render_plan(plan("pretrain", CONFIG, half.url))
    assert text.splitlines()[0] == f"pretrain of {half.url}"
    assert "train@1" in text and "5 of 10" in text and "not measured yet" in text


def test_plan_on_the_command_line(pma: Callable[..., Any], tmp_path: Path, small: tuple[str, ...]) -> None:
    answer = pma("plan", "pretrain", "--config", "tiny", "--run", str(tmp_path / "run"), "--json", *small)
    assert answer.code == 0, answer.stderr
    assert [row["step"] for row in answer.json["steps"]] == ["train", "merge", "evaluate"]
    assert pma("plan", "pretrain", "--config", "tini").code == 2
