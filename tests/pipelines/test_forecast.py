"""Forecasts from a run folder: trained in this process, with real annealing branches, then asked on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.errors import UserError
from pipelines.anneal import branch_config, branch_name
from pipelines.forecast import choose_predictor, forecast
from pipelines.pretrain import start_point
from pipelines.tick import tick
from tasks.checkpoints.run_folder import RunFolder
from tasks.evaluation.anneal_forecast import BackTest, Prediction
from tasks.evaluation.held_out import HeldOutSuite
from tests.local_gang import train
from tests.short_run import begin

ANNEAL = 1280
"""Tokens: ten steps."""


def branch_off(run: RunFolder, step: int) -> None:
    """A real anneal of the run over ten steps, trained and evaluated in this process."""
    trunk, start = run.identity().config, start_point(run, step)
    config = branch_config(trunk, start.tokens_seen, ANNEAL)
    branch = run.branch(branch_name(step))
    branch.begin(config, start)
    train(branch, config)
    evaluate_snapshots(branch)


def evaluate_snapshots(run: RunFolder) -> None:
    suite = HeldOutSuite(run.url, run.identity().config)
    for snapshot in run.snapshots():
        suite.evaluate(snapshot.url)


@pytest.fixture(scope="module")
def annealed(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    run, config = begin(tmp_path_factory.mktemp("run") / "run", "merge.count=2", "snapshots.interval_tokens=640")
    train(run, config)
    evaluate_snapshots(run)
    tick(run.url)
    for step in (30, 45, 60):
        branch_off(run, step)
    return run


def test_forecast_stands_on_the_anneals_and_says_how_far_off_it_was(annealed: RunFolder) -> None:
    answer = forecast(annealed.url)
    assert answer["step"] == 80 and answer["fork_step"] == 70
    assert [row["end_step"] for row in answer["anneals"]] == [40, 55, 70]
    errors = {name: test["mean_absolute_error"] for name, test in answer["back_test"].items() if name != "raw"}
    assert answer["predictor"] == min(errors, key=errors.__getitem__)
    low, high = answer["interval"]
    assert low < answer["forecast_loss"] < high
    assert set(answer["back_test"]) == {"raw", "merged", "merged_with_offset", "law", "combined"}
    assert all(test["anneals"] == 3 for test in answer["back_test"].values())
    assert answer["cannot_know"] == []


@pytest.mark.parametrize(
    ("errors", "chosen"),
    [
        (
            {"combined": [0.2, 0.3, 0.2], "merged_with_offset": [0.1, 0.1, -0.1], "merged": [0.3, 0.3, 0.3]},
            "merged_with_offset",
        ),
        ({"combined": [0.2, 0.3], "merged_with_offset": [0.1, 0.1]}, "combined"),
        ({}, "combined"),
    ],
)
def test_predictor_that_erred_least_is_taken_once_enough_anneals_tell(
    errors: dict[str, list[float]], chosen: str
) -> None:
    said = Prediction(losses=dict.fromkeys(("combined", "merged_with_offset", "merged"), 1.0))
    tests = {name: BackTest(errors={str(i): e for i, e in enumerate(found)}) for name, found in errors.items()}
    assert choose_predictor(said, tests) == chosen


def test_predictions_beside_the_run_are_its_own_losses(annealed: RunFolder) -> None:
    from tasks.evaluation.held_out import read_evaluation, suite_of

    answer, suite = forecast(annealed.url, at=70), suite_of(annealed.identity().config)
    snapshot = next(s for s in annealed.snapshots() if s.step == 70)
    raw = read_evaluation(annealed.store, snapshot.digest, suite)
    merged = read_evaluation(annealed.store, annealed.merged()["sma-n2-v640-step-000000070"].digest, suite)
    assert raw and merged
    assert answer["predictors"]["raw"] == raw.loss
    assert answer["predictors"]["merged"] == merged.loss


def test_run_without_an_anneal_says_so_and_forecasts_its_merge(tmp_path: Path) -> None:
    run, config = begin(tmp_path / "run", "merge.count=2")
    train(run, config)
    evaluate_snapshots(run)
    tick(run.url)
    answer = forecast(run.url)
    assert answer["predictor"] == "merged" and answer["interval"] is None
    assert any("there are 0" in reason for reason in answer["cannot_know"])


def test_unfinished_branch_is_left_out_with_a_reason(annealed: RunFolder) -> None:
    start = start_point(annealed, 50)
    branch = annealed.branch("anneal-begun")
    branch.begin(branch_config(annealed.identity().config, start.tokens_seen, ANNEAL), start)
    try:
        answer = forecast(annealed.url)
        assert len(answer["anneals"]) == 3
        assert any("anneal-begun is not trained" in reason for reason in answer["cannot_know"])
    finally:
        branch.store.delete("run.json")


def test_step_and_budget_that_cannot_be_are_refused(annealed: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--at 33"):
        forecast(annealed.url, at=33)
    with pytest.raises(UserError, match="before the end of warm-up"):
        forecast(annealed.url, tokens=10_240)
    with pytest.raises(UserError, match="give --tokens from 128"):
        forecast(annealed.url, tokens=5)
    fresh, _ = begin(tmp_path / "fresh")
    with pytest.raises(UserError, match="is evaluated yet"):
        forecast(fresh.url)


def test_command_prints_the_answer_first(annealed: RunFolder, pma: Callable[..., Any]) -> None:
    said = pma("forecast", "--run", annealed.url)
    assert said.code == 0, said.stderr
    assert said.stdout.startswith("an anneal over 1,280 tokens that ends at step 80: held-out loss ")
    answer = json.loads(pma("forecast", "--run", annealed.url, "--json").stdout)
    assert f"{answer['forecast_loss']:.4f}" in said.stdout
