"""The demo as a user runs it, and what other tools make of its results."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from cluster.journal import read_events
from cluster.storage import open_store
from tasks.checkpoints.run_folder import RunFolder
from tasks.evaluation.held_out import read_evaluation, slice_loss, suite_of
from tests.plain_text import held_out_slices

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
DemoRun = tuple[Path, dict[str, Any]]
# float32 forward passes in another order of operations (transformers picks its own expert kernel).
LOSS_TOLERANCE = 2e-5


def model_tensors(folder: str) -> dict[str, np.ndarray]:
    return {
        name: value
        for path in sorted(Path(folder).glob("model-*.safetensors"))
        for name, value in load_file(path).items()
    }


def test_demo_json_has_every_field_of_the_contract(demo_run: DemoRun) -> None:
    _, answer = demo_run
    for key in ("raw_loss", "merged_loss", "annealed_loss", "forecast_loss", "seconds"):
        assert isinstance(answer[key], float), key
    assert Path(answer["report"]).is_file()
    assert answer["annealed_loss"] < answer["raw_loss"]


def test_demo_leaves_one_manifest_for_each_due_merge(demo_run: DemoRun) -> None:
    run = RunFolder(str(demo_run[0]))
    scheduled = [name for name in run.merged() if name.startswith("sma-n3-")]
    ends = {s.step for s in run.snapshots()}
    # The first snapshot is the end of warmup; windows of three start with the third.
    assert len(scheduled) == len(ends) - 2
    assert not [e for e in read_events(run.store) if e["kind"] == "worker-lost"]


def test_transformers_loads_every_checkpoint_and_finds_the_logged_loss(demo_run: DemoRun) -> None:
    run = RunFolder(str(demo_run[0]))
    config = run.identity().config
    slices = held_out_slices(config)
    checkpoints = [(s.url, s.manifest.digest) for s in run.snapshots()]
    checkpoints += [(f"{run.url}/merged/{name}", m.digest) for name, m in run.merged().items()]
    assert len(checkpoints) > 20
    for url, digest in checkpoints:
        network, info = AutoModelForCausalLM.from_pretrained(url, output_loading_info=True)
        assert not info["missing_keys"], url
        assert not info["unexpected_keys"], url
        logged = read_evaluation(run.store, digest, suite_of(config))
        assert logged is not None, url
        with torch.inference_mode():
            loss = slice_loss(network.eval(), slices[0], 64)
        assert loss == pytest.approx(logged.slices[0], abs=LOSS_TOLERANCE), url


def test_merged_checkpoint_equals_the_float64_mean_of_its_inputs(demo_run: DemoRun) -> None:
    run = RunFolder(str(demo_run[0]))
    name, manifest = max(run.merged().items())
    assert manifest.merge is not None
    merged = model_tensors(f"{run.url}/merged/{name}")
    inputs = [model_tensors(item.url) for item in manifest.merge.inputs]
    assert merged.keys() == inputs[0].keys()
    for key, value in merged.items():
        terms = [w * x[key].astype(np.float64) for w, x in zip(manifest.merge.weights, inputs, strict=True)]
        exact = np.sum(terms, axis=0)
        # The bound that tasks/merging/kernel.py documents.
        bound = (len(terms) + 2) * 2.0**-24 * np.sum(np.abs(terms), axis=0) + 2.0**-24 * np.abs(exact)
        assert (np.abs(value - exact) <= bound).all(), key


def test_manifest_names_inputs_by_digest_and_manifest_digest(demo_run: DemoRun) -> None:
    run = RunFolder(str(demo_run[0]))
    snapshots = {s.url: s.manifest for s in run.snapshots()}
    for manifest in run.merged().values():
        assert manifest.merge is not None
        for item in manifest.merge.inputs:
            assert item.digest == snapshots[item.url].digest
            assert item.manifest_digest
        assert sum(manifest.merge.weights) == pytest.approx(1.0, abs=1e-12)


def test_run_folder_holds_no_pickle_and_no_leftovers(demo_run: DemoRun) -> None:
    files = [path for path in demo_run[0].rglob("*") if path.is_file()]
    assert not [p for p in files if p.suffix in (".pt", ".pth", ".bin", ".pkl", ".distcp")]
    assert not [p for p in files if "receipts" in p.parts]
    assert not [p for p in files if p.name.endswith(".part") and "guard" not in p.name]


def test_report_is_self_contained_and_says_what_was_found(demo_run: DemoRun) -> None:
    page = Path(demo_run[1]["report"]).read_text()
    assert not re.findall(r'(?:src|href)="https?:', page)
    assert not re.findall(r"<script[^>]+src", page) and "default-src 'none'" in page
    # Held-out loss, training, router health, a snapshot beside training.
    assert page.count("<svg") == 4
    assert f"{demo_run[1]['annealed_loss']:.4f}" in page
    assert "of what annealing gains" in page


def test_mlflow_holds_tree_metrics_and_registered_alias(demo_run: DemoRun) -> None:
    with sqlite3.connect(demo_run[0] / "mlflow.db") as db:
        runs = dict(db.execute("select run_uuid, name from runs").fetchall())
        parents = dict(db.execute("select run_uuid, value from tags where key = 'mlflow.parentRunId'").fetchall())
        alias = db.execute("select name, alias, version from registered_model_aliases").fetchall()
        sources = dict(db.execute("select version, source from model_versions").fetchall())
        points = db.execute("select key, count(*) from metrics group by key").fetchall()
        status = {row[0] for row in db.execute("select distinct status from runs")}
    # The run is called by its configuration and its folder.
    top = [key for key, name in runs.items() if name == "tiny (run)"]
    assert len(top) == 1
    assert set(parents.values()) == set(top)
    assert {"segment 1", "merges", "evaluations"} < {runs[key] for key in parents}
    assert any(name.startswith("anneal from step") for name in runs.values())
    assert sorted(alias) == [("pmaflow-tiny", "champion", 1), ("pmaflow-tiny", "pma-latest", 1)]
    assert sources[1].endswith("merged/sma-n3-v51200-step-000000400")
    counts = dict(points)
    assert counts["train/loss"] == 400 + 100
    assert counts["evaluation/raw_loss"] == 16 + 4
    assert status == {"FINISHED"}


def test_demo_again_does_no_work_and_says_the_same(
    demo_run: DemoRun, pma: Callable[..., Any], small: tuple[str, ...]
) -> None:
    run, first = demo_run
    before = {path: path.stat().st_mtime_ns for path in run.rglob("manifest.json")}
    again = pma("demo", "--run", str(run), "--json", *small)
    assert again.code == 0, again.stderr
    for key in ("raw_loss", "merged_loss", "annealed_loss"):
        assert again.json[key] == first[key]
    assert {path: path.stat().st_mtime_ns for path in run.rglob("manifest.json")} == before
    assert len(RunFolder(str(run)).segments()) == 1


def test_status_lists_the_run_without_ray(demo_run: DemoRun, pma: Callable[..., Any]) -> None:
    answer = pma("status", "--run", str(demo_run[0]), "--json")
    assert answer.code == 0, answer.stderr
    status = answer.json
    assert [row["step"] for row in status["snapshots"]] == list(range(25, 401, 25))
    assert all(row["healthy"] and row["phase"] == "stable" for row in status["snapshots"])
    assert status["due"] == []
    assert status["leases"] == []
    assert status["tracking"]["lag"] == 0


def test_pretrain_with_another_configuration_is_refused_field_by_field(
    demo_run: DemoRun, pma: Callable[..., Any]
) -> None:
    answer = pma("pretrain", "--config", "tiny", "--run", str(demo_run[0]), "--json", "seed=7")
    assert answer.code == 2
    assert answer.json["error"] == "UserError"
    assert "seed: run has 1, asked for 7" in answer.json["message"]
    assert "training.total_tokens: run has 819200" in answer.json["message"]


def test_merge_command_on_ray_and_local_gives_the_same_digest(
    demo_run: DemoRun, pma: Callable[..., Any], tmp_path: Path
) -> None:
    options = ("--run", str(demo_run[0]), "--count", "4", "--method", "ema", "--alpha", "0.3", "--json")
    local = pma("merge", *options, "--output", str(tmp_path / "local"), "--workers", "1")
    ray = pma("merge", *options, "--output", str(tmp_path / "ray"), "--workers", "ray")
    assert local.code == 0, local.stderr
    assert ray.code == 0, ray.stderr
    assert local.json["digest"] == ray.json["digest"]
    assert [item["step"] for item in local.json["inputs"]] == [325, 350, 375, 400]
    assert local.json["weights"] == pytest.approx([0.343, 0.147, 0.21, 0.3])


def test_merge_dry_run_prints_a_plan_and_writes_nothing(
    demo_run: DemoRun, pma: Callable[..., Any], tmp_path: Path
) -> None:
    output = tmp_path / "planned"
    answer = pma("merge", "--run", str(demo_run[0]), "--count", "3", "--output", str(output), "--dry-run", "--json")
    assert answer.code == 0, answer.stderr
    plan = answer.json["plan"]
    assert {"task", "parameter_groups", "bytes_read", "bytes_written", "memory_bytes"} <= plan[0].keys()
    groups = [group for row in plan for group in row["parameter_groups"]]
    assert "layers.0.experts" in groups
    assert len(groups) == len(set(groups))
    assert not output.exists()


def test_evaluate_command_returns_the_recorded_loss(demo_run: DemoRun, pma: Callable[..., Any]) -> None:
    run = RunFolder(str(demo_run[0]))
    last = run.snapshots()[-1]
    answer = pma("evaluate", last.url, "--json")
    assert answer.code == 0, answer.stderr
    assert answer.json["results"][0]["loss"] == demo_run[1]["raw_loss"]


def test_verify_holds_for_every_merge_and_names_a_flipped_byte(
    demo_run: DemoRun, pma: Callable[..., Any], tmp_path: Path
) -> None:
    run = RunFolder(str(demo_run[0]))
    name = max(run.merged())
    answer = pma("verify", f"{run.url}/merged/{name}", "--json")
    assert answer.code == 0, answer.stderr
    assert answer.json["ok"] is True
    assert answer.json["digest"] == run.merged()[name].digest
    damaged = shutil.copytree(Path(run.url) / "merged" / name, tmp_path / name)
    shard = next(damaged.glob("model-*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-3] ^= 4
    shard.write_bytes(data)
    answer = pma("verify", str(damaged), "--json")
    assert answer.code == 1
    assert answer.json["ok"] is False
    assert shard.name in answer.json["problems"][0]


def test_anneal_from_a_step_without_snapshot_names_those_that_exist(demo_run: DemoRun, pma: Callable[..., Any]) -> None:
    answer = pma("anneal", "--run", str(demo_run[0]), "--from", "7", "--json")
    assert answer.code == 2
    assert "no snapshot at step 7; there are 16 snapshots" in answer.json["message"]


def test_journal_survives_as_the_source_of_every_metric(demo_run: DemoRun) -> None:
    store = open_store(str(demo_run[0]))
    keys = [key for key in store.keys("journal") if key.endswith(".jsonl")]
    rows = [json.loads(line) for key in keys for line in store.read(key).splitlines()]
    assert [row["step"] for row in rows if "train/loss" in row["metrics"]] == list(range(1, 401))
    # The last words of the segment are about its last snapshot.
    assert [row["step"] for row in rows if "train/loss" not in row["metrics"]] == [400]
    assert all(key.startswith("snapshot/") for key in rows[-1]["metrics"])
