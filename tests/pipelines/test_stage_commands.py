"""The command line of stages: seeds as people write them, and mistakes named before anything starts."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from pipelines.commands import stages
from pipelines.commands.stages import continue_training, join_seeds
from pipelines.submit import understand


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What the command would do."""
    found: dict[str, object] = {}
    monkeypatch.setattr(stages, "_run", lambda stage, **options: found.update(options, stage=stage))
    return found


@pytest.mark.parametrize(
    "words", [("--seeds", "1", "2", "3"), ("--seeds", "1,2,3"), ("--seeds", "1,2", "3"), ("--seeds=1,2,3",)]
)
def test_seeds_are_given_apart_or_by_commas(asked: dict[str, object], words: tuple[str, ...]) -> None:
    arguments = ("--config", "tiny", "--init", "/a", *words, "merge.count=3", "--control", "/b")
    done = CliRunner().invoke(continue_training, arguments)
    assert done.exit_code == 0, done.output
    assert asked["seeds"] == (1, 2, 3)
    assert asked["overrides"] == ("merge.count=3",)
    assert (asked["init"], asked["control"], asked["stage"]) == ("/a", "/b", "continue-training")


def test_numbers_that_follow_no_seeds_stay_where_they_are() -> None:
    assert join_seeds(["7", "--seeds", "1", "a=2", "3"]) == ["7", "--seeds", "1", "a=2", "3"]


@pytest.mark.parametrize("words", [("--seeds", "one"), ("--seeds", "1,,2"), ("--seeds", "-1"), ("--seeds", "1.5")])
def test_seed_that_is_no_whole_number_is_a_usage_error(asked: dict[str, object], words: tuple[str, ...]) -> None:
    done = CliRunner().invoke(continue_training, ("--config", "tiny", "--init", "/a", *words))
    assert done.exit_code == 2
    assert "expected whole numbers, such as --seeds 1 2 3" in done.output
    assert asked == {}


def test_stage_without_init_is_a_usage_error() -> None:
    with pytest.raises(click.MissingParameter):
        continue_training.make_context("continue-training", ["--config", "tiny"])


def test_stage_submitted_as_a_job_is_one_job_whichever_way_its_seeds_are_written() -> None:
    command = ("continue-training", "--config", "tiny", "--run", "/runs/ct", "--init", "/a", "--control", "/b")
    apart, joined = understand((*command, "--seeds", "1", "2")), understand((*command, "--seeds", "1,2"))
    assert apart.name == joined.name
    assert apart.name.startswith("ct-continue-training-")
    assert understand((*command, "--seeds", "1")).name != apart.name


def test_stage_submitted_with_a_relative_init_is_refused() -> None:
    from configs.errors import UserError

    with pytest.raises(UserError, match="runs/tiny/merged/a: on a cluster this would be lost"):
        understand(("continue-training", "--config", "tiny", "--run", "/runs/ct", "--init", "runs/tiny/merged/a"))
