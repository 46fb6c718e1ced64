"""The seam between pipelines and what is trained: the page's own example, and what is said of one that does not fit."""

from __future__ import annotations

import json
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from cluster.storage import open_store
from configs.errors import ConfigError, UserError
from configs.load import config_from_dict, config_to_dict, identity_of, load_config
from configs.schema import Config
from pipelines.evaluate import evaluate
from pipelines.pretrain import prepare_run
from tasks.checkpoints.run_folder import RunFolder
from tasks.data.skips import SkipRange
from tasks.evaluation.held_out import suite_of
from tasks.language_model import LanguageModel
from tasks.workload import DrawnRows, NamedRows, open_workload, stated_workload
from tasks.workload_checks import require_workload
from tests.conftest import ROOT
from tests.local_gang import train

SMALL = (
    "training.sequence_length=2", "training.batch_tokens=32", "training.num_workers=1", "training.total_tokens=9600",
    "snapshots.interval_tokens=3200", "schedule.warmup_tokens=0", "schedule.peak_learning_rate=0.05",
    "anneal.tokens=320", "evaluation.slice_tokens=2", "merge.count=2", "recovery.policy=ignore",
)  # fmt: skip
SLOPE = 2.0


@pytest.fixture
def module() -> Any:
    """An importable module with the workload of docs/workloads.md."""
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "workloads.md").read_text(), re.DOTALL)
    assert code is not None
    made = types.ModuleType("written_by_a_user")
    exec(compile(code[1], "docs/workloads.md", "exec"), made.__dict__)
    sys.modules[made.__name__] = made
    yield made
    del sys.modules[made.__name__]


def config_of(*overrides: str, entry: str = "written_by_a_user:Line") -> Config:
    chosen = (f"workload.entry={entry}", f"workload.options.slope={SLOPE}")
    return load_config("tiny", (*SMALL, *chosen, *overrides)).config


def test_example_of_the_page_trains_evaluates_and_is_about_twenty_lines(module: Any, tmp_path: Path) -> None:
    config = config_of()
    run = prepare_run(str(tmp_path / "run"), config)
    train(run, config)
    last = RunFolder(run.url).snapshots()[-1]
    assert last.step == 300
    (path,) = Path(last.url).glob("model-*.safetensors")
    weights = load_file(path)
    assert weights["weight"][0, 0] == pytest.approx(SLOPE, abs=0.2)
    (row,) = evaluate([last.url], None)["results"]
    x = np.linspace(0, 1, 11)
    expected = np.mean((weights["weight"][0, 0] * x + weights["bias"][0] - SLOPE * x) ** 2)
    assert row["loss"] == pytest.approx(expected, rel=1e-4)
    assert len(row["slices"]) == config.evaluation.num_slices


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("no_such_package.lines:Line", "there is no module 'no_such_package'"),
        ("written_by_a_user:Lime", "has no Lime; workloads there: Line"),
        ("json:dumps", "lacks build, batches, loss, evaluate"),
    ],
)
def test_entry_that_is_no_workload_is_refused_before_anything_is_written(
    module: Any, entry: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        prepare_run(str(tmp_path / "run"), config_of(entry=entry))
    assert not (tmp_path / "run").exists()


def test_workload_without_one_function_is_told_which(module: Any) -> None:
    del module.Line.loss
    with pytest.raises(UserError, match="it lacks loss; a workload has build, batches, loss, evaluate"):
        open_workload(config_of())


@pytest.mark.parametrize("entry", ["lines", "lines.Line", "a b:c", ":x", "x:"])
def test_entry_of_another_form_is_a_mistake_of_the_configuration(entry: str) -> None:
    with pytest.raises(ConfigError, match=r"workload\.entry"):
        config_of(entry=entry)


def test_options_without_an_entry_are_a_mistake_of_the_configuration() -> None:
    with pytest.raises(ConfigError, match=r"workload\.options"):
        load_config("tiny", ("workload.options.slope=2",))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda config: torch.nn.Linear(2, 2).double(), "weight is float64"),
        (lambda config: torch.nn.Identity(), "expected a module with parameters"),
        (lambda config: torch.nn.Linear(2, 2).requires_grad_(False), "parameters that are trained"),
        (lambda config: torch.nn.ParameterList([torch.tensor(1.0)]), r"0 is float32 \[\]"),
    ],
)
def test_network_that_no_snapshot_could_hold_is_refused(
    module: Any, monkeypatch: pytest.MonkeyPatch, build: Callable[[Config], torch.nn.Module], message: str
) -> None:
    monkeypatch.setattr(module.Line, "build", lambda self, config: build(config))
    with pytest.raises(UserError, match=message):
        require_workload(config_of())


def test_evaluation_with_another_number_of_slices_is_marked(
    module: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = prepare_run(str(tmp_path / "run"), config_of("training.total_tokens=3200"))
    train(run, run.identity().config)
    monkeypatch.setattr(module.Line, "evaluate", lambda self, config: lambda network: [{"all": (1.0, 1)}])
    with pytest.raises(UserError, match=r"evaluation\.num_slices=3"):
        evaluate([RunFolder(run.url).snapshots()[-1].url], None)


def test_runs_of_language_models_keep_their_identity_and_record_names() -> None:
    config = load_config("tiny").config
    assert not [key for key in identity_of(config) if key.startswith("workload")]
    assert isinstance(open_workload(config), LanguageModel)
    old = config_to_dict(config)
    del old["workload"]
    assert config_from_dict(old) == config


def test_entry_and_options_are_identity_and_name_records(module: Any) -> None:
    config = config_of()
    found = identity_of(config)
    assert found["workload.entry"] == "written_by_a_user:Line"
    assert found["workload.options"] == {"slope": SLOPE}
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config
    suites = {suite_of(config), suite_of(config_of("workload.options.slope=3")), suite_of(load_config("tiny").config)}
    assert len(suites) == 3


def test_drawn_rows_depend_on_positions_alone_and_jump_over_skips() -> None:
    batches = DrawnRows(lambda positions: {"at": torch.from_numpy(positions)}, digest="d")
    assert batches.read(3, 2)["at"].tolist() == [3, 4]
    assert batches.read(3, 3, [SkipRange(at=4, count=10)])["at"].tolist() == [3, 14, 15]
    assert batches.read(0, 4).rows(1, 9)["at"].tolist() == [1, 2, 3]


def test_named_rows_of_other_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x has shape \[2, 3\]"):
        NamedRows({"x": torch.zeros(2, 3)}, 4)


def test_checkpoint_says_its_workload(memory_store: Any) -> None:
    assert stated_workload(memory_store) is None
    memory_store.put("workload.json", b'{"entry": "a:B", "options": {}}')
    assert stated_workload(open_store(memory_store.url)) == "a:B"
