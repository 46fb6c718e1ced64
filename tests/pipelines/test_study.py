"""A whole study, its gangs in this process: every experiment, every verdict, the page; and the same call again does nothing."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.errors import UserError
from configs.schema import Config
from configs.study import StudyConfig, load_study
from pipelines.anneal import branch_config, branch_name
from pipelines.initial import begin_with
from pipelines.pretrain import start_point
from pipelines.stages import StageRequest, plan_stage
from pipelines.study import story as story_module
from pipelines.study import training as training_module
from pipelines.study.story import study
from pipelines.tick import tick
from tasks.checkpoints.run_folder import RunFolder
from tests.chat_data import pairs, write_rows
from tests.local_gang import train
from tests.short_run import SMALL
from tests.stage_arms import evaluate

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def continue_here(run: RunFolder, config: Config) -> None:
    """Train in this process, then make the scheduled merges and evaluate everything."""
    train(run, config)
    tick(run.url)
    evaluate(run, config)


def anneal_here(run_url: str, fork: int) -> None:
    trunk = RunFolder(run_url)
    start, config = start_point(trunk, fork), trunk.identity().config
    branch = trunk.branch(branch_name(fork))
    branch.begin(branch_config(config, start.tokens_seen, config.anneal.tokens), start)
    train(branch, branch.identity().config)
    evaluate(branch, branch.identity().config)


def stage_here(run_url: str, config: Config, request: StageRequest) -> None:
    (pair,) = plan_stage(RunFolder(run_url), config, request)
    begin_with(pair.init)
    train(pair.init.run, config)
    evaluate(pair.init.run, config)


@pytest.fixture
def micro(tmp_path: Path) -> StudyConfig:
    rows = write_rows(tmp_path / "rows.jsonl", pairs(120))
    chat = [
        "data.format=chat", f"data.sources=[{rows}]", "data.chat_template=plain", "data.held_out_fraction=0.3",
        "training.sequence_length=48", "training.batch_tokens=192", "training.total_tokens=3840",
        "snapshots.interval_tokens=960", "anneal.tokens=192", "schedule.warmup_tokens=0", "evaluation.num_slices=2",
        "evaluation.slice_tokens=96",
    ]  # fmt: skip
    values = {
        "name": "micro",
        "base": "tiny",
        "overrides": [*SMALL, "anneal.tokens=5120", "merge.count=3", "merge.comparison_counts=[2,3]"],
        "seeds": [1, 2],
        "forks": [30, 40],
        "grid": {"counts": [2, 3, 4], "interval_multiples": [1, 2], "alphas": [0.1, 0.2], "ends": [40, 80]},
        "inside_count": 2,
        "continued": {
            "config": "tiny",
            "overrides": [*SMALL, "training.total_tokens=2560"],
            "arms": [
                {"name": "raw", "start": "raw"},
                {"name": "merged", "start": "merged"},
                {"name": "merged-half", "start": "merged", "overrides": ["schedule.peak_learning_rate=1.5e-3"]},
            ],
        },
        "sft": {
            "config": "tiny",
            "overrides": [*SMALL, *chat],
            "arms": [
                {"name": "annealed", "start": "annealed"},
                {"name": "annealed-merged", "start": "annealed-merged"},
            ],
        },
        "spikes": {"faults": ["corrupt-weights"], "arms": ["pma"]},
        "curvature": {"count": 3, "tokens": 256, "contour_points": 4},
    }
    (tmp_path / "micro.yaml").write_text(yaml.safe_dump(values))
    return load_study(str(tmp_path / "micro.yaml"))


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Gangs in this process; the list names what was asked for."""
    asked: list[str] = []

    def noted(name: str, function: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            asked.append(name)
            function(*arguments)

        return call

    monkeypatch.setattr(training_module, "continue_run", noted("trunk", continue_here))
    monkeypatch.setattr(training_module, "anneal", noted("anneal", anneal_here))
    monkeypatch.setattr(training_module, "run_stage", noted("arm", stage_here))
    monkeypatch.setattr(story_module, "ray_session", lambda *_: contextlib.nullcontext())
    return asked


def test_study_measures_judges_and_tells_and_does_not_do_it_twice(
    micro: StudyConfig, here: list[str], tmp_path: Path
) -> None:
    told: list[str] = []
    answer = study(str(tmp_path / "study"), micro, tell=told.append)
    assert (here.count("trunk"), here.count("anneal"), here.count("arm")) == (2, 4, 10)
    findings = {finding["name"]: finding for finding in answer["findings"]}
    assert len(findings) == 15
    assert {finding["verdict"] for finding in findings.values()} <= {"reproduced", "partly", "not reproduced"}
    for finding in findings.values():
        assert all(len(claim["values"]) in (2, 1) for claim in finding["claims"]), finding["name"]
    figures = json.loads((tmp_path / "study/page/micro/figures.json").read_text())

    grid = figures["grid-1"]
    by_hand = next(c for c in grid["methods"] if (c["method"], c["end_step"]) == ("sma", 80))
    (claim,) = [c for c in findings["Stable phase"]["claims"] if "80" in c["text"]]
    assert claim["values"][0] == pytest.approx(grid["raw"]["80"] - by_hand["loss"])
    gain = figures["curvature-1"]["measured"]
    assert gain == pytest.approx(sum(figures["curvature-1"]["losses"]) / 3 - figures["curvature-1"]["merged_loss"])
    assert findings["SFT"]["claims"][0]["values"][0] == pytest.approx(
        figures["sft-1"]["arms"]["annealed-merged"]["final_loss"] - figures["sft-1"]["arms"]["annealed"]["final_loss"]
    )
    assert len(figures["forks-1"]["forks"]) == 2 and figures["forks-1"]["forks"][0]["fork_step"] == 30

    page = Path(answer["page"]).read_text()
    assert page.startswith("# Study `micro`") and "**Of 15 findings:" in page
    for finding in findings.values():
        assert f"**{finding['name']}**" in page
    for image in (tmp_path / "study/page/micro").glob("*.svg"):
        assert f"(micro/{image.name})" in page and "<svg" in image.read_text()

    here.clear()
    told.clear()
    again = study(str(tmp_path / "study"), micro, output=str(tmp_path / "elsewhere"), tell=told.append)
    assert not here and not told
    assert again["findings"] == answer["findings"]
    assert Path(again["page"]).read_text() == page


def test_study_that_stopped_goes_on_after_the_last_whole_step(
    micro: StudyConfig, here: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_module, "run_stage", lambda *_: pytest.fail("stop here"))
    small = load_study(str(tmp_path / "micro.yaml"), ("seeds=[1]", "spikes=null", "sft=null"))
    with pytest.raises(pytest.fail.Exception):
        study(str(tmp_path / "study"), small)
    assert here.count("trunk") == 1
    here.clear()
    monkeypatch.setattr(training_module, "run_stage", stage_here)
    answer = study(str(tmp_path / "study"), small)
    assert not here
    # One seed has no interval: nothing is surely so.
    assert "reproduced" not in {claim["verdict"] for f in answer["findings"] for claim in f["claims"]}


@pytest.mark.parametrize(
    ("override", "culprit"),
    [
        ("grid.ends=[45,80]", "no snapshot at step 45"),
        ("forks=[30]", "it is to end with the trunk, at 80"),
        ("inside_count=9", "the anneal has 4 snapshots"),
        ("spikes.faults=[gremlins]", "'gremlins'"),
        ("grid.counts=[6,7]", "do not fit before step 40"),
        ("continued.overrides=[model.hidden_size=48]", "raw has another model section"),
        ("sft.overrides=[]", "data.format=chat"),
        ("overrides=['model.hiden_size=3']", "hiden_size"),
    ],
)
def test_mistakes_are_named_before_anything_is_trained(
    micro: StudyConfig, tmp_path: Path, override: str, culprit: str, here: list[str]
) -> None:
    assert micro.name == "micro"
    with pytest.raises(UserError, match=culprit):
        study(str(tmp_path / "study"), load_study(str(tmp_path / "micro.yaml"), (override,)))
    assert not here and not (tmp_path / "study" / "steps").exists()


def test_study_in_object_storage_is_refused(micro: StudyConfig) -> None:
    with pytest.raises(UserError, match="give --run a path"):
        study("memory://study", micro)
