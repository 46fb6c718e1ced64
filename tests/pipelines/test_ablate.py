"""Ablations of a run that was trained in this process: made once, compared, taken away again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from configs.errors import UserError
from pipelines import ablate as pipeline
from pipelines.ablate import ablate
from tasks.checkpoints.run_folder import RunFolder
from tests.local_gang import train
from tests.short_run import begin

V = 1280


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    run, config = begin(tmp_path_factory.mktemp("run") / "run", "merge.count=2")
    train(run, config)
    return run


def model_of(url: str) -> dict[str, np.ndarray]:
    return {k: v for path in sorted(Path(url).glob("model-*.safetensors")) for k, v in load_file(path).items()}


def test_grid_is_made_evaluated_and_taken_away(trained: RunFolder) -> None:
    answer = ablate(trained.url, ("counts=[2,3]", f"intervals=[{V}]", "methods=[sma,wma]", "ends=[60,80]"))
    assert [(c["method"], c["count"], c["end_step"]) for c in answer["cells"]] == [
        ("sma", 2, 60), ("sma", 3, 60), ("wma", 2, 60), ("wma", 3, 60),
        ("sma", 2, 80), ("sma", 3, 80), ("wma", 2, 80), ("wma", 3, 80),
    ]  # fmt: skip
    assert [end["step"] for end in answer["ends"]] == [60, 80]
    for end in answer["ends"]:
        losses = {c["name"]: c["loss"] for c in answer["cells"] if c["end_step"] == end["step"]}
        assert losses[end["best"]] == min(losses.values())
        assert end["chosen"] in end["not_told_apart"]
    assert not [key for key in trained.store.keys("ablations/cells") if key.endswith((".safetensors", "manifest.json"))]
    stored = json.loads(Path(answer["record"]).read_text())
    assert stored["cells"] == answer["cells"]


def test_again_nothing_is_merged_nor_evaluated(trained: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ("counts=[2]", f"intervals=[{V}]", "methods=[sma]", "ends=[70]")
    first = ablate(trained.url, settings)

    def no_more(*_: Any, **__: Any) -> Any:
        raise AssertionError("made again")

    monkeypatch.setattr(pipeline, "carry_out", no_more)
    monkeypatch.setattr(pipeline, "evaluate_checkpoints", no_more)
    assert ablate(trained.url, settings)["cells"] == first["cells"]


def test_kept_merge_is_the_mean_and_its_loss_is_of_these_weights(trained: RunFolder) -> None:
    answer = ablate(trained.url, ("counts=[2]", f"intervals=[{2 * V}]", "methods=[sma]", "ends=[80]"), keep=True)
    (cell,) = answer["cells"]
    merged = model_of(f"{trained.url}/ablations/cells/{cell['name']}")
    by_step = {s.step: s.url for s in trained.snapshots()}
    inputs = [model_of(by_step[60]), model_of(by_step[80])]
    assert merged.keys() == inputs[0].keys()
    for key, value in merged.items():
        exact = (inputs[0][key].astype(np.float64) + inputs[1][key]) / 2
        assert np.allclose(value, exact, rtol=0, atol=1e-7), key


def test_merge_that_stands_in_the_run_is_used_and_stays(trained: RunFolder) -> None:
    from pipelines.tick import tick

    tick(trained.url)
    name = f"sma-n2-v{V}-step-000000050"
    answer = ablate(trained.url, ("counts=[2]", f"intervals=[{V}]", "methods=[sma]", "ends=[50]"))
    assert answer["cells"][0]["digest"] == trained.merged()[name].digest
    assert not trained.store.exists(f"ablations/cells/{name}/manifest.json")


def test_interrupted_grid_goes_on_where_it_stopped(trained: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ("counts=[2]", f"intervals=[{V},{2 * V}]", "methods=[wma]", "ends=[70]")
    real, made = pipeline.make_merges, []
    monkeypatch.setattr(pipeline, "BATCH", 1)

    def stop_at_the_second(run: RunFolder, cells: Any, workers: str) -> dict[str, str]:
        made.append([cell.name for cell in cells])
        if len(made) == 2:
            raise KeyboardInterrupt
        return real(run, cells, workers)

    monkeypatch.setattr(pipeline, "make_merges", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        ablate(trained.url, settings)
    assert len(ablate(trained.url, settings)["cells"]) == 2
    assert [len(names) for names in made] == [1, 1, 1] and made[1] == made[2] != made[0]


def test_merges_of_an_interrupted_batch_are_used(trained: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ("counts=[2,3]", f"intervals=[{V},{2 * V}]", "methods=[wma]", "ends=[50]")
    made: list[int] = []
    real = pipeline.carry_out
    monkeypatch.setattr(pipeline, "carry_out", lambda workers, plans: made.append(len(plans)) or real(workers, plans))
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "evaluate_urls", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            ablate(trained.url, settings)
    assert made == [2, 2]
    names = {cell["name"] for cell in ablate(trained.url, settings)["cells"]}
    assert len(names) == 4 and made == [2, 2]
    left = [key for key in trained.store.keys("ablations/cells") if key.endswith((".safetensors", "manifest.json"))]
    assert not [key for key in left if key.split("/")[2] in names]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (("count=[3]",), "KEY one of methods, counts"),
        (("counts=[3,3]",), "each once"),
        (("counts=[a]",), "expected a list of int"),
        (("counts=[1]",), "numbers from 2 on"),
        (("methods=[mean]",), "mean"),
        (("ends=[33]",), "no snapshot at step 33"),
        (("counts=[50]",), "at most"),
    ],
)
def test_settings_that_cannot_be_are_refused(trained: RunFolder, settings: tuple[str, ...], match: str) -> None:
    with pytest.raises(UserError, match=match):
        ablate(trained.url, settings)


def test_run_without_snapshots_says_so(tmp_path: Path) -> None:
    run, _ = begin(tmp_path / "run")
    with pytest.raises(UserError, match="no committed snapshots"):
        ablate(run.url)


def test_command_prints_what_to_take_first(trained: RunFolder, pma: Callable[..., Any]) -> None:
    said = pma("ablate", "--run", trained.url, "counts=[2,3]", f"intervals=[{V}]", "methods=[sma,wma]", "ends=[80]")
    assert said.code == 0, said.stderr
    assert said.stdout.startswith("step 80, raw ") and ": take " in said.stdout.splitlines()[0]


def test_best_interval_is_set_against_the_size_of_other_runs(
    trained: RunFolder, tmp_path: Path, pma: Callable[..., Any]
) -> None:
    other, config = begin(tmp_path / "wide", "model.hidden_size=64", "training.total_tokens=5120")
    train(other, config)
    grid = ("counts=[2]", f"intervals=[{V},{2 * V}]", "methods=[sma]")
    ask = ("ablate", "--run", trained.url, *grid, "ends=[80]", "--beside", other.url)
    refused = pma(*ask)
    assert refused.code == 2 and f"pma ablate --run {other.url}" in refused.stderr
    ablate(other.url, (*grid, "ends=[40]"))
    answer = json.loads(pma(*ask, "--json").stdout)["scaling"]
    assert [run["run"] for run in answer["runs"]] == [trained.url, other.url]
    assert answer["runs"][0]["active_parameters"] < answer["runs"][1]["active_parameters"]
    assert all(run["interval_tokens"] in run["tried"] == [V, 2 * V] for run in answer["runs"])
    assert answer["fit"]["points"] == 2 and answer["fit"]["exponent_interval"] is None
    assert "V grows with size to the power of" in pma(*ask).stdout
