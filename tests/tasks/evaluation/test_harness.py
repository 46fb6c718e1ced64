"""The harness as a program: asked first, run in the right folder, its results read; by a stand-in with a real results file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from configs.errors import UserError
from tasks.evaluation.harness import HarnessFailed, parse_results, probe_harness, run_harness
from tasks.evaluation.task_files import SHIPPED, find_tasks
from tests.stand_in_harness import RESULTS, calls, make_stand_in


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def test_real_results_are_read() -> None:
    results = parse_results(json.loads(RESULTS.read_text()))
    assert results.scores["stdlib_brackets"] == {"acc": 0.9125, "acc_stderr": 0.01827769864568368}
    assert results.samples == {"stdlib_brackets": 240, "stdlib_typos": 240, "stdlib_words": 240}
    assert results.of("stdlib_typos") == {"stdlib_typos": results.scores["stdlib_typos"]}


def test_group_has_its_own_scores_and_those_of_its_tasks() -> None:
    values = {
        "results": {"all": {"alias": "all", "acc,none": 0.5}, "a": {"acc,none": 0.25, "acc,strict": 0.125}, "b": {"f1,none": "N/A"}},
        "group_subtasks": {"all": ["some"], "some": ["a", "b"]},
    }  # fmt: skip
    results = parse_results(values)
    assert results.of("all") == {"all": {"acc": 0.5}, "a": {"acc": 0.25, "acc,strict": 0.125}, "b": {"f1": None}}
    assert results.of("some") == {"a": {"acc": 0.25, "acc,strict": 0.125}, "b": {"f1": None}}


def test_probe_of_an_environment_without_it_says_how_to_get_it(tmp_path: Path) -> None:
    for python in (str(make_stand_in(tmp_path, installed=False)), sys.executable):
        with pytest.raises(
            UserError, match=r"has no lm-evaluation-harness \(.*\); pip install 'pmaflow\[lm-eval\]'"
        ) as refused:
            probe_harness(python, [])
        assert "\n" not in str(refused.value)


def test_probe_of_a_path_that_is_no_program(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--lm-eval-python .*: No such file"):
        probe_harness(str(tmp_path / "python"), [])


@pytest.mark.parametrize(
    ("name", "hint"),
    [("hellaswagg", "did you mean 'hellaswag'"), ("stdlib_typo", "did you mean 'stdlib_typos'"), ("zzz", "0.4.13$")],
)
def test_unknown_task_is_one_line_with_the_nearest(tmp_path: Path, name: str, hint: str) -> None:
    with pytest.raises(UserError, match=f"no task '{name}' ships.*{hint}") as refused:
        probe_harness(str(make_stand_in(tmp_path)), find_tasks(f"hellaswag,{name}"))
    assert "\n" not in str(refused.value)


def test_probe_tells_the_version(tmp_path: Path) -> None:
    assert probe_harness(str(make_stand_in(tmp_path)), find_tasks("hellaswag,stdlib_typos")) == "0.4.13"


def test_local_tasks_run_in_their_folder_offline_and_others_as_the_user_has_it(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    python = make_stand_in(tmp_path / "bin")
    tasks = find_tasks("stdlib_typos,hellaswag,stdlib_words")
    found = run_harness(str(python), model, tasks, dtype="bfloat16", batch_sequences=7)
    assert found.keys() == {"stdlib_typos", "hellaswag", "stdlib_words"}
    own, others = calls(python)
    assert (own["cwd"], own["options"]["--tasks"]) == (str(SHIPPED), "stdlib_typos,stdlib_words")
    assert (own["options"]["--include_path"], own["options"]["--batch_size"]) == (str(SHIPPED), "7")
    assert own["options"]["--model_args"] == f"pretrained={model},dtype=bfloat16"
    assert own["offline"][0] == "1"
    # What it cached is gone with it.
    assert own["offline"][1]
    assert not Path(own["offline"][1]).parent.exists()
    assert others["options"]["--tasks"] == "hellaswag"
    assert "--include_path" not in others["options"]
    assert others["offline"] == [None, None]


def test_failure_tells_its_last_words(tmp_path: Path, model: Path) -> None:
    python = make_stand_in(tmp_path / "bin", fails_on="typos")
    with pytest.raises(HarnessFailed, match=r"failed on stdlib_typos: RuntimeError: the harness broke$"):
        run_harness(str(python), model, find_tasks("stdlib_typos"), dtype="float32", batch_sequences=1)
