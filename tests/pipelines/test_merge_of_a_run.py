"""Merges of a real run's snapshots: chosen by evaluation, with moments, across borders, and run in transformers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow]
DemoRun = tuple[Path, dict[str, Any]]
Pma = Callable[..., Any]


@pytest.mark.parametrize("method", ["greedy", "search"])
def test_merge_chosen_by_evaluation_is_no_worse_than_the_average(
    demo_run: DemoRun, pma: Pma, tmp_path: Path, method: str
) -> None:
    run = str(demo_run[0])
    output = tmp_path / method
    answer = pma(
        "merge", "--run", run, "--count", "3", "--method", method, "--output", str(output), "--json", seconds=280
    )
    assert answer.code == 0, answer.stderr
    assert math.fsum(answer.json["weights"]) == pytest.approx(1.0, abs=1e-9)
    trace = json.loads((output / "manifest.json").read_text())["options"]["trace"]
    assert trace["tuning_loss"] <= trace["sma_tuning_loss"]
    assert math.isfinite(trace["hold_out_loss"])
    assert trace["trials"]
    assert not any((demo_run[0] / "trials").rglob("*.safetensors")), "trial merges are removed"
    checked = pma("verify", str(output), "--json")
    assert checked.code == 0, checked.stdout


def test_verify_load_runs_a_merge_beside_the_mean_of_its_inputs(demo_run: DemoRun, pma: Pma, tmp_path: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        output = str(tmp_path / dtype)
        made = pma("merge", "--run", str(demo_run[0]), "--count", "3", "--dtype", dtype, "--output", output, "--json")
        assert made.code == 0, made.stderr
        checked = pma("verify", output, "--load", "--json")
        assert checked.code == 0, checked.stdout
        assert checked.json["checks"]["loads in transformers"]["ok"]


def test_verify_load_notices_weights_that_are_not_the_means(demo_run: DemoRun, pma: Pma, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert pma("merge", "--run", str(demo_run[0]), "--count", "3", "--output", str(output), "--json").code == 0
    path = output / "manifest.json"
    values = json.loads(path.read_text())
    values["weights"] = [0.9, 0.1, 0.0]
    path.write_text(json.dumps(values))
    checked = pma("verify", str(output), "--load", "--json")
    assert checked.code == 1
    assert not checked.json["checks"]["loads in transformers"]["ok"]


def test_merge_with_moments_can_be_trained_on(demo_run: DemoRun, pma: Pma, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("moments: merge\n")
    output = tmp_path / "out"
    answer = pma(
        "merge", "--run", str(demo_run[0]), "--count", "3", "--policy", str(policy), "--output", str(output), "--json"
    )
    assert answer.code == 0, answer.stderr
    assert answer.json["policies"]["optimizer_moments"] == "merge"
    manifest = json.loads((output / "manifest.json").read_text())
    state = {tensor["name"] for shard in manifest["shards"] if shard["part"] == "state" for tensor in shard["tensors"]}
    model = {tensor["name"] for shard in manifest["shards"] if shard["part"] == "model" for tensor in shard["tensors"]}
    assert state == {f"{moment}.{name}" for moment in ("exp_avg", "exp_avg_sq") for name in model}
    assert json.loads((output / "state.json").read_text())["step"] == manifest["step"]
    assert pma("verify", str(output)).code == 0


def test_merge_of_a_branch_crosses_its_fork_only_if_asked(demo_run: DemoRun, pma: Pma, tmp_path: Path) -> None:
    branch = next((demo_run[0] / "branches").iterdir())
    asked = ("merge", "--run", str(branch), "--count", "50", "--output", str(tmp_path / "out"), "--json", "--dry-run")
    refused = pma(*asked)
    assert refused.code == 2
    assert "--across fork" in refused.json["message"]
    window = ("merge", "--run", str(branch), "--count", "8", "--output", str(tmp_path / "out"), "--json", "--dry-run")
    crossing = pma(*window, "--across", "fork", "--across", "phase")
    if crossing.code == 0:
        urls = [item["url"] for item in crossing.json["inputs"]]
        assert any("/branches/" not in url for url in urls)
        assert "/branches/" in urls[-1]
    else:
        assert "--across" not in crossing.json["message"]


def test_moe_report_of_a_real_run_names_its_layers(demo_run: DemoRun, pma: Pma, tmp_path: Path) -> None:
    options = ("merge", "--run", str(demo_run[0]), "--count", "3", "--output", str(tmp_path / "out"), "--dry-run")
    answer = pma(*options, "--moe-report", "--json")
    assert answer.code == 0, answer.stderr
    report = answer.json["moe_report"]
    assert len(report["layers"]) == 2
    assert all(0 < drift < 1 for row in report["layers"] for drift in row["drift_mean"])
    assert len(report["routers"]) == 2
    assert not (tmp_path / "out").exists()
    assert "drift from input to input" in pma(*options, "--moe-report").stdout
