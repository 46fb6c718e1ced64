"""`pma evaluate`: many checkpoints, what is missing, and one that fails among them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import LeaseHeld
from cluster.lease import hold_lease
from configs.errors import UserError
from pipelines.evaluate import evaluate
from pipelines.render import render_evaluation
from pipelines.tick import EVALUATE_LEASE, tick
from tasks.checkpoints.run_folder import RunFolder
from tests.network_run import begin_network_run, commit_network, damage, network_config

SHARD = "model-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with four snapshots, a merge, and a branch with two snapshots."""
    folder = tmp_path_factory.mktemp("made") / "run"
    run = begin_network_run(str(folder), 4)
    commit_network(run.store.child("merged/by-hand"), network_config(), seed=99, step=40, kind="merged")
    begin_network_run(str(folder / "branches" / "cool"), 2)
    commit_network(run.store.child("snapshots/step-000000045"), network_config(), seed=45, step=45, ephemeral=True)
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> RunFolder:
    return RunFolder(str(shutil.copytree(made, tmp_path / "run")))


def names(answer: dict[str, Any], run: RunFolder) -> list[str]:
    return [row["url"].removeprefix(f"{run.url}/") for row in answer["results"]]


def test_missing_fills_in_snapshots_merges_and_branches_once(run: RunFolder) -> None:
    known = evaluate([f"{run.url}/snapshots/step-000000020"], None)
    assert known["results"][0]["reused"] is False
    answer = evaluate((), run.url, missing=True)
    assert names(answer, run) == [
        "snapshots/step-000000010", "snapshots/step-000000030", "snapshots/step-000000040", "merged/by-hand",
        "branches/cool/snapshots/step-000000010", "branches/cool/snapshots/step-000000020",
    ]  # fmt: skip
    assert answer["ok"]
    assert all(row["loss"] > 0 and row["domain_bits_per_byte"]["all"] > 0 for row in answer["results"])
    assert len(run.store.keys("evaluations")) == 5
    assert len(run.store.keys("branches/cool/evaluations")) == 2
    assert evaluate((), run.url, missing=True) == {"ok": True, "results": []}
    assert render_evaluation({"results": []}) == "nothing lacks a record"


def test_named_ones_come_in_order_and_from_the_record(run: RunFolder) -> None:
    urls = [
        f"{run.url}/merged/by-hand",
        f"{run.url}/branches/cool/snapshots/step-000000010",
        f"{run.url}/merged/by-hand",
    ]
    first, again = evaluate(urls, None), evaluate(urls[::-1], None)
    assert [row["url"] for row in first["results"]] == urls[:2]
    assert [row["reused"] for row in first["results"]] == [False, False]
    assert [{**row, "reused": False} for row in again["results"]] == first["results"]
    assert [row["reused"] for row in again["results"]] == [True, True]


@pytest.mark.parametrize("workers", ["local", "2"])
def test_one_that_fails_is_marked_and_the_others_go_on(run: RunFolder, workers: str) -> None:
    damage(run.store, f"snapshots/step-000000010/{SHARD}")
    wide = network_config("model.hidden_size=64")
    commit_network(run.store.child("merged/wide"), wide, seed=1, step=40, kind="merged")
    run.store.put("snapshots/step-000000020/manifest.json", b"{")
    urls = [f"{run.url}/snapshots/step-0000000{step}" for step in (10, 20, 30)] + [f"{run.url}/merged/wide"]
    answer = evaluate(urls, None, workers=workers)
    assert answer["ok"] is False
    assert [row["ok"] for row in answer["results"]] == [False, False, True, False]
    texts = [row.get("error", "") for row in answer["results"]]
    assert "has digest" in texts[0]
    assert "manifest.json" in texts[1]
    assert "does not fit the network" in texts[3]
    assert answer["results"][0] | {"error": ""} == {
        "url": urls[0], "ok": False, "error": "", "loss": None, "domains": {}
    }  # fmt: skip
    lines = render_evaluation(answer).splitlines()
    assert lines[0] == f"not measured  {urls[0]}"
    assert lines[1].startswith("        FAILED: ")
    assert len(run.store.keys("evaluations")) == 1


def test_command_ends_with_1_when_one_fails(run: RunFolder, pma: Callable[..., Any]) -> None:
    damage(run.store, f"snapshots/step-000000010/{SHARD}")
    answer = pma("evaluate", "--run", run.url, "--missing", "--json")
    assert answer.code == 1, answer.stderr
    assert [row["ok"] for row in answer.json["results"]].count(False) == 1
    assert len(answer.json["results"]) == 7


def test_url_without_a_checkpoint_is_refused_before_any_work(run: RunFolder) -> None:
    with pytest.raises(UserError, match="no checkpoint here"):
        evaluate([f"{run.url}/snapshots/step-000000010", f"{run.url}/snapshots/step-9"], None)
    assert run.store.keys("evaluations") == []


def test_missing_is_left_to_the_driver_that_holds_the_lease(run: RunFolder) -> None:
    with hold_lease(run.store, EVALUATE_LEASE), pytest.raises(LeaseHeld):
        evaluate((), run.url, missing=True)
    assert run.store.keys("evaluations") == []


def test_tick_names_a_merge_that_cannot_be_evaluated_and_evaluates_the_others(run: RunFolder) -> None:
    commit_network(run.store.child("merged/other"), network_config(), seed=7, step=40, kind="merged")
    damage(run.store, f"merged/by-hand/{SHARD}")
    answer = tick(run.url)
    assert answer["ok"] is False
    assert [row["name"] for row in answer["failed"]] == ["by-hand"]
    assert answer["evaluated"] == [f"{run.url}/merged/other"]


@pytest.mark.parametrize(
    ("urls", "run_url", "missing", "workers", "words"),
    [
        ((), None, False, "local", "name checkpoints to evaluate"),
        ((), None, True, "local", "give --run URL"),
        (("a",), "b", True, "local", "no other URL"),
        (("a",), None, False, "local", "not inside a run folder"),
        ((), "b", True, "many", "expected ray, local or a number"),
        ((), "memory://nothing-here", True, "local", "holds no run"),
    ],
)
def test_bad_requests_are_refused_in_a_line(
    urls: tuple[str, ...], run_url: str | None, missing: bool, workers: str, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        evaluate(urls, run_url, missing=missing, workers=workers)


def test_processes_cannot_see_memory(tmp_path: Path) -> None:
    run = begin_network_run("memory://evaluate-in-memory", 1)
    with pytest.raises(UserError, match="cannot see memory://"):
        evaluate((), run.url, missing=True, workers="2")
    assert evaluate((), run.url, missing=True)["ok"]
