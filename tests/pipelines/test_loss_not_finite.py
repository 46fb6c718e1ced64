"""Weights whose held-out loss is not finite: measured once, said plainly, and no command fails for it ever after."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.storage import Store
from configs.load import load_config
from pipelines.evaluate import evaluate
from pipelines.render import render_evaluation, render_status
from pipelines.report.data import gather
from pipelines.status import status
from tasks.checkpoints.catalog import CATALOG_KEY, Catalog
from tasks.checkpoints.run_folder import RunFolder
from tasks.evaluation.held_out import Evaluation, evaluation_key, read_evaluation, suite_of, write_evaluation
from tests.retention_run import make_run, snapshot_url


@pytest.fixture
def run(tmp_path: Path) -> Store:
    return make_run(str(tmp_path / "run"), range(1, 4), load_config("tiny", ("tracking.uri=null",)).config)


def record(store: Store, step: int, loss: float) -> Evaluation:
    """Put on record that the snapshot at ``step`` has ``loss``."""
    folder = RunFolder(store.url)
    evaluation = Evaluation(
        digest=next(s.digest for s in folder.snapshots() if s.step == step), suite=suite_of(folder.identity().config),
        loss=loss, slices=(loss, 2.0), domains={"all": loss}, bits_per_byte=loss, tokens=10,
    )  # fmt: skip
    write_evaluation(store, evaluation)
    return evaluation


def refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_record_is_json_and_reads_back_as_no_number(run: Store, loss: float) -> None:
    made = record(run, 1, loss)
    data = run.read(evaluation_key(made.digest, made.suite))
    assert json.loads(data, parse_constant=refuse)["loss"] is None
    read = read_evaluation(run, made.digest, made.suite)
    assert read is not None
    assert math.isnan(read.loss) and math.isnan(read.slices[0]) and math.isnan(read.domains["all"])
    assert read.slices[1] == 2.0


def test_status_says_not_finite_again_and_again_and_keeps_its_cache(run: Store) -> None:
    record(run, 1, math.nan)
    record(run, 2, 1.5)
    for _ in range(2):
        answer = status(run.url)
        assert [(s["loss"], s["evaluated"]) for s in answer["snapshots"]] == [(None, True), (1.5, True), (None, False)]
        json.dumps(answer, allow_nan=False)
        lines = [line for line in render_status(answer).splitlines() if "healthy" in line]
        assert [line.rpartition("  ")[2] for line in lines] == ["held-out not finite", "held-out 1.5000", ""]
    assert json.loads(run.read(CATALOG_KEY), parse_constant=refuse)["content"]["losses"]


def test_record_of_an_earlier_version_that_says_nan_is_read(run: Store) -> None:
    made = record(run, 1, 1.0)
    key = evaluation_key(made.digest, made.suite)
    run.put(key, run.read(key).replace(b'"loss": 1.0', b'"loss": NaN'))
    assert b"NaN" in run.read(key)
    assert status(run.url)["snapshots"][0]["loss"] is None


def test_catalog_keeps_what_is_not_finite_as_none(run: Store) -> None:
    run.put("evaluations/a-s.json", b"{}")
    assert Catalog(run).losses(lambda _: math.nan) == {"evaluations/a-s.json": None}
    asked: list[str] = []

    def read(key: str) -> float:
        asked.append(key)
        return 1.0

    assert Catalog(run).losses(read) == {"evaluations/a-s.json": None}
    assert asked == []


def test_evaluate_and_report_go_on(run: Store) -> None:
    record(run, 1, math.nan)
    record(run, 3, 1.25)
    answer = evaluate((snapshot_url(run, 1), snapshot_url(run, 3)), None)
    assert [row["loss"] for row in answer["results"]] == [None, 1.25]
    assert (answer["results"][0]["slices"], answer["results"][0]["domains"]) == ([None, 2.0], {"all": None})
    json.dumps(answer, allow_nan=False)
    assert [line.split("  ")[0] for line in render_evaluation(answer).splitlines()] == ["not finite", "1.2500"]
    assert [row.name for row in gather(run.url).raw] == ["step 3"]


def test_json_answer_of_a_command_never_fails_on_a_number(pma: Callable[..., Any], run: Store) -> None:
    record(run, 1, math.inf)
    answer = pma("evaluate", snapshot_url(run, 1), "--json")
    assert answer.code == 0, answer.stderr
    assert answer.json["results"][0]["loss"] is None
