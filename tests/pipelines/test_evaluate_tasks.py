"""`pma evaluate --tasks`: scores on record by digest, asked once, by a stand-in for the harness."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.evaluate import evaluate
from pipelines.evaluate_tasks import open_harness
from pipelines.render import render_evaluation
from pipelines.status import status
from tasks.checkpoints.run_folder import RunFolder
from tasks.evaluation.task_scores import all_scores
from tests.network_run import begin_network_run, damage
from tests.stand_in_harness import calls, make_stand_in


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return begin_network_run(str(tmp_path / "run"), 3)


@pytest.fixture
def python(tmp_path: Path) -> Path:
    return make_stand_in(tmp_path / "bin")


def urls_of(run: RunFolder) -> list[str]:
    return [snapshot.url for snapshot in run.snapshots()]


def test_scores_are_recorded_by_digest_and_asked_once(run: RunFolder, python: Path) -> None:
    url = urls_of(run)[0]
    answer = evaluate([url], None, harness=open_harness("stdlib_typos", str(python)))
    row = answer["results"][0]
    assert row["loss"] > 0
    assert row["tasks"] == {"stdlib_typos": {"acc": 0.9125, "acc_stderr": 0.01827769864568368}}
    assert render_evaluation(answer).splitlines()[1] == "        stdlib_typos: acc 0.9125 ± 0.0183"
    (record,) = all_scores(run.store)
    assert (record.digest, record.step, record.tokens_seen, record.harness) == (row["digest"], 10, 1280, "0.4.13")
    assert run.store.exists(f"evaluations/{row['digest']}-lm-eval-{record.fingerprint}.json")
    # Of two tasks, only the new one is asked; of the same ones, none.
    more = evaluate([url], None, harness=open_harness("stdlib_words,stdlib_typos", str(python)))
    assert more["results"][0]["tasks"].keys() == {"stdlib_typos", "stdlib_words"}
    assert more["results"][0]["tasks_reused"] == 1
    evaluate([url], None, harness=open_harness("stdlib_typos", str(python)))
    assert [call["options"]["--tasks"] for call in calls(python)] == ["stdlib_typos", "stdlib_words"]


def test_harness_gets_a_folder_with_the_weights_and_a_byte_tokenizer(run: RunFolder, python: Path) -> None:
    evaluate(urls_of(run)[:1], None, harness=open_harness("stdlib_typos", str(python)))
    (call,) = calls(python)
    assert call["files"]["model-00001-of-00001.safetensors"] is True  # a link
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= call["files"].keys()


def test_missing_tasks_are_filled_in(run: RunFolder, python: Path) -> None:
    evaluate(urls_of(run), None)
    evaluate(urls_of(run)[:1], None, harness=open_harness("stdlib_typos", str(python)))
    answer = evaluate((), run.url, missing=True, harness=open_harness("stdlib_typos", str(python)))
    assert [row["url"] for row in answer["results"]] == urls_of(run)[1:]
    assert len(all_scores(run.store)) == 3
    assert evaluate((), run.url, missing=True, harness=open_harness("stdlib_typos", str(python)))["results"] == []


def test_one_that_the_harness_fails_on_is_marked_and_others_go_on(run: RunFolder, tmp_path: Path) -> None:
    first, second, third = urls_of(run)
    evaluate([first], None)
    # On record, so that its loss is known; the shard went bad since.
    damage(run.store, "snapshots/step-000000010/model-00001-of-00001.safetensors")
    python = make_stand_in(tmp_path / "bin")
    answer = evaluate([first, second], None, harness=open_harness("stdlib_typos", str(python)))
    assert answer["ok"] is False
    assert "has digest" in answer["results"][0]["error"]
    assert answer["results"][0]["loss"] > 0
    assert answer["results"][1]["tasks"]
    broken = make_stand_in(tmp_path / "broken", fails_on="typos")
    answer = evaluate([third], None, harness=open_harness("stdlib_typos", str(broken)))
    assert answer["results"][0]["error"].endswith("RuntimeError: the harness broke")
    assert len(all_scores(run.store)) == 1


def test_status_and_losses_are_as_they_were_beside_such_records(run: RunFolder, python: Path) -> None:
    evaluate(urls_of(run), None)
    before = [(row["loss"], row["evaluated"]) for row in status(run.url)["snapshots"]]
    evaluate(urls_of(run), None, harness=open_harness("stdlib_typos", str(python)))
    assert [(row["loss"], row["evaluated"]) for row in status(run.url)["snapshots"]] == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--tasks", "stdlib_typo"), "did you mean 'stdlib_typos'"),
        (("--tasks", "nowhere/a.yaml"), "No such file"),
        (("--tasks", "stdlib_typos", "--lm-eval-python", "no-such-python"), "--lm-eval-python no-such-python"),
    ],
)
def test_command_refuses_before_anything_is_run(
    run: RunFolder, python: Path, pma: Callable[..., Any], arguments: tuple[str, ...], words: str
) -> None:
    stand_in = () if "--lm-eval-python" in arguments else ("--lm-eval-python", str(python))
    answer = pma("evaluate", urls_of(run)[0], *arguments, *stand_in, "--json")
    assert answer.code == 2
    assert words in json.loads(answer.stdout)["message"]
    assert len(answer.stderr.strip().splitlines()) == 1
    assert run.store.keys("evaluations") == []
    assert calls(python) == []
