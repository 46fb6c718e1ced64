"""What MLflow is told of a stage: whose weights it began with, its curve from the start, and what its arms differ by."""

from __future__ import annotations

from pathlib import Path

import pytest
from local_gang import train
from stage_arms import ask, evaluate, make_parent

from pipelines.arms import record_comparison
from pipelines.stages import summarise_stage
from pipelines.tracking import bring_up_to_date


def test_mlflow_holds_lineage_of_both_arms_the_start_of_the_curve_and_the_comparison(tmp_path: Path) -> None:
    parent = make_parent(tmp_path / "parent")
    early, late = parent.snapshots()[0], parent.snapshots()[-1]
    pairs = ask(tmp_path, late.url, early.url)
    for arm in pairs[0].arms:
        train(arm.run, arm.config)
        evaluate(arm.run, arm.config)
    top, config = pairs[0].init.run, pairs[0].init.config
    result = summarise_stage(pairs, {})
    record_comparison(top, result["comparison"])
    record_comparison(top, result["comparison"])
    assert len(top.store.keys("comparisons")) == 1
    # MLflow makes its database first, for which one turn's time may not be enough on a loaded machine.
    answers = [bring_up_to_date(top, config) for _ in range(4)]
    assert (answers[-1]["error"], answers[-1]["lag"]) == (None, 0)

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{top.url}/mlflow.db")
    (experiment,) = [e.experiment_id for e in client.search_experiments() if e.name != "Default"]
    runs = {run.data.tags["pma.part"]: run for run in client.search_runs([experiment])}
    for part, start in (("run", late), ("branches/control", early)):
        tags = runs[part].data.tags
        assert (tags["pma.init_url"], tags["pma.init_digest"]) == (start.url, start.digest)
    assert runs["branches/control"].data.tags["mlflow.parentRunId"] == runs["run"].info.run_id
    assert "pma.init_url" not in runs["evaluations"].data.tags
    curve = client.get_metric_history(runs["evaluations"].info.run_id, "evaluation/raw_loss")
    assert sorted((m.step, m.value) for m in curve)[0] == (0, pytest.approx(result["init"]["loss"]))
    metrics = runs["run"].data.metrics
    final = result["comparison"]["seeds"][0]["differences"]["final_loss"]
    assert metrics["comparison/final_loss"] == pytest.approx(final["mean"])
    assert metrics["comparison/final_loss_low"] == pytest.approx(final["low"])
    assert "comparison.json" in [item.path for item in client.list_artifacts(runs["run"].info.run_id)]
    charts = [item.path for item in client.list_artifacts(runs["run"].info.run_id, "charts")]
    assert "charts/comparison.svg" in charts
    assert runs["run"].data.tags["mlflow.note.content"].startswith("**Final held-out loss ")
    for part in ("run", "branches/control"):
        data = {item.dataset.name: item.tags[0].value for item in runs[part].inputs.dataset_inputs}
        assert data == {"tiny": "training", "held-out": "evaluation"}
