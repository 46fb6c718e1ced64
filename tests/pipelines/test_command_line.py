"""The command line's edge: exit codes, one-line errors, JSON for failures, no work before a mistake is named."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("pretrain", "--config", "tiny", "training.totl_tokens=3"), "did you mean 'training.total_tokens'"),
        (("pretrain", "--config", "tinny"), "did you mean 'tiny'"),
        (("pretrain", "--config", "tiny", "seed=x"), "seed"),
        (("pretrain", "--config", "tiny", "training.batch_tokens=1000"), "multiple of training.sequence_length"),
        (("pretrain", "--config", "tiny", "data.sources=[/no/such/folder]"), "'/no/such/folder' holds no files"),
        (("demo", "anneal.tokens=2048"), "must be a snapshot"),
        (("merge", "--run", "/no/such/run", "--count", "3"), "holds no run"),
        (("merge", "--inputs", "/no/such/checkpoint", "--output", "/tmp/x"), "no checkpoint here"),
        (("merge", "--output", "/tmp/x"), "give either --run"),
        (("merge", "stray", "--run", "/r"), "go after --inputs"),
        (("merge", "--run", "/r", "--method", "ema"), "--alpha"),
        (("status", "--run", "/no/such/run"), "holds no run"),
        (("mrge",), "Did you mean"),
        (("status",), "--run"),
    ],
)
def test_mistake_exits_2_in_one_object_with_the_cure(
    pma: Callable[..., Any], arguments: tuple[str, ...], expected: str, tmp_path: Path
) -> None:
    where = ("--run", str(tmp_path / "run")) if arguments[0] in ("pretrain", "demo") else ()
    answer = pma(arguments[0], *where, "--json", *arguments[1:])
    assert answer.code == 2, answer.stderr
    assert expected in answer.json["message"]
    assert "Traceback" not in answer.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "url", ["s3://AKIAEXAMPLE:verysecret@bucket/run", "s3://bucket/run?token=verysecret", "gs://bucket/run"]
)
def test_url_that_carries_secrets_or_cannot_commit_is_refused_without_repeating_it(
    pma: Callable[..., Any], url: str
) -> None:
    answer = pma("pretrain", "--config", "tiny", "--run", url, "--json")
    assert answer.code == 2
    assert "verysecret" not in answer.stdout + answer.stderr


def test_tracking_uri_with_password_is_refused_before_any_work(pma: Callable[..., Any], tmp_path: Path) -> None:
    answer = pma(
        "pretrain", "--config", "tiny", "--run", str(tmp_path / "r"), "--json", "tracking.uri=http://u:verysecret@h/"
    )
    assert answer.code == 2
    assert "verysecret" not in answer.stdout + answer.stderr
    assert not (tmp_path / "r").exists()


def test_help_imports_no_heavy_library() -> None:
    code = "import sys; import pipelines.__main__; print([m for m in ('torch','ray','mlflow','fsspec','omegaconf','numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_config_show_says_where_each_value_came_from(pma: Callable[..., Any]) -> None:
    answer = pma("config", "show", "tiny", "seed=5", "--json")
    origins = answer.json["origins"]
    assert answer.json["config"]["seed"] == 5
    assert origins["seed"] == "command line"
    assert origins["model.hidden_size"].endswith("tiny.yaml")
    assert origins["optimizer.beta1"] == "schema default"


def test_every_command_has_help_and_json(pma: Callable[..., Any]) -> None:
    for command in ("demo", "pretrain", "anneal", "merge", "evaluate", "status", "report"):
        answer = pma(command, "--help")
        assert answer.code == 0
        assert "--json" in answer.stdout
