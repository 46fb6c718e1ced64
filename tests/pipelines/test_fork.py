"""A run whose configuration is to change is forked: a new run below it, from its newest snapshot."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.errors import UserError
from configs.load import load_config
from pipelines.anneal import anneal
from pipelines.pretrain import prepare_fork
from tasks.checkpoints.run_folder import RunFolder
from tests.retention_run import commit, make_run

MORE = "training.total_tokens=870400"
"""25 steps after the 400 of the small run."""


@pytest.mark.ray
@pytest.mark.slow
def test_changed_config_is_refused_with_a_difference_and_forks_by_name(
    pma: Callable[..., Any], demo_run: tuple[Path, dict[str, Any]], small: tuple[str, ...], tmp_path: Path
) -> None:
    trunk = tmp_path / "run"
    shutil.copytree(demo_run[0], trunk)
    before = [(s.step, s.digest) for s in RunFolder(str(trunk)).snapshots()]
    command = ("pretrain", "--config", "tiny", "--run", str(trunk), "--json", *small, MORE, "merge.count=2")
    refused = pma(*command)
    assert refused.code == 2
    assert "training.total_tokens: run has 819200, asked for 870400" in refused.json["message"]
    assert "merge.count: run has 3, asked for 2" in refused.json["message"]
    assert "--fork NAME" in refused.json["message"]

    forked = pma(*command, "--fork", "longer")
    assert forked.code == 0, forked.stderr
    branch = RunFolder(str(trunk / "branches" / "longer"))
    start = branch.identity().start
    assert start is not None and (start.step, start.digest) == before[-1]
    assert forked.json["final_step"] == 425
    assert [s.step for s in branch.snapshots()] == [425]
    assert [(s.step, s.digest) for s in RunFolder(str(trunk)).snapshots()] == before

    again = pma(*command, "--fork", "longer")
    assert (again.code, again.json["digest"]) == (0, forked.json["digest"])


@pytest.fixture
def trunk(tmp_path: Path) -> RunFolder:
    return RunFolder(make_run(str(tmp_path / "run"), range(1, 4), load_config("tiny").config).url)


@pytest.mark.parametrize(
    ("override", "key"),
    [("model.hidden_size=32", "model.hidden_size"), ("training.batch_tokens=4096", "training.batch_tokens")],
)
def test_fork_with_another_shape_is_refused_by_key(trunk: RunFolder, override: str, key: str) -> None:
    overrides = (override, "snapshots.interval_tokens=102400") if "batch" in override else (override,)
    with pytest.raises(UserError, match=key):
        prepare_fork(trunk.url, "other", load_config("tiny", overrides).config)
    assert trunk.branches() == []


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden"])
def test_fork_with_an_impossible_name_is_refused(trunk: RunFolder, name: str) -> None:
    with pytest.raises(UserError, match="letters, digits"):
        prepare_fork(trunk.url, name, load_config("tiny").config)


def test_fork_of_a_run_without_snapshots_is_refused(tmp_path: Path) -> None:
    run = make_run(str(tmp_path / "run"), (), load_config("tiny").config)
    with pytest.raises(UserError, match="no committed snapshot to fork from"):
        prepare_fork(run.url, "early", load_config("tiny").config)


@pytest.mark.parametrize("beyond", [0, 2048])
def test_fork_that_would_end_at_its_start_or_before_is_refused(tmp_path: Path, beyond: int) -> None:
    config = load_config("tiny").config
    total = config.training.total_tokens
    run = RunFolder(make_run(str(tmp_path / "run"), (), config).url)
    commit(run.store, 3, tokens_seen=total - 2048)
    assert prepare_fork(run.url, "one-more-step", config).identity().config == config
    commit(run.store, 4, tokens_seen=total + beyond)
    with pytest.raises(UserError, match=rf"training\.total_tokens={total:,} .* has seen {total + beyond:,} tokens"):
        prepare_fork(run.url, "none", config)
    assert run.branches() == ["one-more-step"]


@pytest.mark.parametrize("tokens", [0, -2048])
def test_annealing_over_no_tokens_is_refused(trunk: RunFolder, tokens: int) -> None:
    with pytest.raises(UserError, match=rf"annealing branch of {tokens:,} tokens from its start at 300 "):
        anneal(trunk.url, 3, tokens=tokens)
    assert trunk.branches() == []


def test_fork_that_exists_keeps_its_start_while_its_run_goes_on(trunk: RunFolder) -> None:
    config = load_config("tiny", ("schedule.peak_learning_rate=0.001",)).config
    first = prepare_fork(trunk.url, "slower", config).identity()
    commit(trunk.store, 4)
    assert prepare_fork(trunk.url, "slower", config).identity() == first
    assert first.start is not None and first.start.step == 3
