"""The champion alias moves by rule alone, once, whatever the order in which MLflow hears of things."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from local_gang import train
from registered import aliases, catch_up, make_database, make_merge, measure, register
from short_run import begin

from cluster.model_registry import ModelRegistry
from configs.load import override
from configs.schema import Config
from pipelines.gc import registered_digests
from pipelines.status import newest_events
from pipelines.tracked.registration import PROMOTION_EVENT, PROMOTION_TAG, ask_registration
from pipelines.tracking import CURSOR_KEY, bring_up_to_date
from tasks.checkpoints.manifest import read_manifest
from tasks.checkpoints.run_folder import RunFolder

MODEL = "pmaflow-tiny"


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with three merges: ``n2``, ``n3`` and ``n4``."""
    folder = tmp_path_factory.mktemp("merged") / "run"
    run, config = begin(folder, "training.total_tokens=5120")
    train(run, config)
    for count in (2, 3, 4):
        make_merge(run, f"n{count}", inputs=tuple(s.url for s in run.snapshots()[-count:]))
    return folder


@pytest.fixture
def run(merged: Path, tmp_path: Path) -> RunFolder:
    shutil.copytree(merged, tmp_path / "run")
    return RunFolder(str(tmp_path / "run"))


@pytest.fixture
def config(run: RunFolder, tmp_path: Path) -> Config:
    return override(run.identity().config, (f"tracking.uri={make_database(tmp_path)}",))


def digest_of(run: RunFolder, name: str) -> str:
    return read_manifest(run.store.child(f"merged/{name}"))[0].digest


def enter(run: RunFolder, config: Config, name: str, *slices: float) -> None:
    """Register the merge ``name`` with that loss, if any."""
    if slices:
        measure(run, config, digest_of(run, name), *slices)
    register(run, config, f"{run.url}/merged/{name}")


def undo(run: RunFolder, config: Config, name: str) -> None:
    """The cursor as if the driver had been lost between deciding about ``name`` and moving the alias."""
    cursors, digest = json.loads(run.store.read(CURSOR_KEY)), digest_of(run, name)
    cursor = cursors[str(config.tracking.uri)]
    cursor["items"].remove(f"decision/{digest}")
    cursor["decisions"][digest]["carried_out"] = False
    run.store.put(CURSOR_KEY, json.dumps(cursors).encode())


def tags(config: Config, number: str) -> dict[str, str]:
    version = ModelRegistry(str(config.tracking.uri)).version(MODEL, number)
    assert version is not None
    return dict(version.tags)


def promotions(run: RunFolder) -> list[dict[str, object]]:
    return [event for event in newest_events(run.store) if event["kind"] == PROMOTION_EVENT]


def test_better_version_becomes_champion_and_a_worse_one_does_not(run: RunFolder, config: Config) -> None:
    uri = str(config.tracking.uri)
    enter(run, config, "n2", 3.0, 3.1, 3.2)
    assert aliases(uri, MODEL) == {"pma-latest": "1", "champion": "1"}
    enter(run, config, "n3", 2.9, 3.01, 3.11)
    assert aliases(uri, MODEL) == {"pma-latest": "2", "champion": "2"}
    enter(run, config, "n4", 3.0, 3.0, 3.1)
    assert aliases(uri, MODEL) == {"pma-latest": "3", "champion": "2"}
    assert tags(config, "2")[PROMOTION_TAG].startswith(
        "moved: 3.0067 against 3.1000 of pmaflow-tiny/1: lower by 0.0933"
    )
    assert tags(config, "3")[PROMOTION_TAG].startswith("kept: 3.0333 against 3.0067")
    assert [event["moved"] for event in promotions(run)] == [True, True, False]
    assert [event["version"] for event in promotions(run)] == ["1", "2", "3"]


def test_gain_within_one_standard_error_moves_nothing(run: RunFolder, config: Config) -> None:
    enter(run, config, "n2", 3.0, 3.0, 3.0)
    # Lower by 0.01 on average; the slices differ by 0.1.
    enter(run, config, "n3", 3.1, 2.87, 3.0)
    assert aliases(str(config.tracking.uri), MODEL)["champion"] == "1"
    assert "less than 1 standard error" in tags(config, "2")[PROMOTION_TAG]


def test_equal_version_moves_nothing_even_without_a_margin(run: RunFolder, config: Config) -> None:
    config = override(config, ("tracking.champion_margin_errors=0",))
    enter(run, config, "n2", 3.0, 3.0, 3.0)
    enter(run, config, "n3", 3.0, 3.0, 3.0)
    assert aliases(str(config.tracking.uri), MODEL)["champion"] == "1"


def test_evaluation_that_comes_later_decides_then(run: RunFolder, config: Config) -> None:
    uri = str(config.tracking.uri)
    enter(run, config, "n2")
    assert aliases(uri, MODEL) == {"pma-latest": "1"}
    assert PROMOTION_TAG not in tags(config, "1")
    measure(run, config, digest_of(run, "n2"), 3.0, 3.1)
    assert catch_up(run, config)["promotions"][0]["moved"] is True
    assert aliases(uri, MODEL)["champion"] == "1"
    assert tags(config, "1")["pma.held_out_loss"] == "3.05"


def test_turns_that_are_repeated_change_nothing_a_person_did_since(run: RunFolder, config: Config) -> None:
    uri = str(config.tracking.uri)
    enter(run, config, "n2", 3.0, 3.1)
    enter(run, config, "n3", 2.0, 2.1)
    registry = ModelRegistry(uri)
    first = registry.version(MODEL, "1")
    assert first is not None
    registry.set_alias("champion", first)
    # The cursor as it was before the last turn: all of it is sent again.
    cursors = json.loads(run.store.read(CURSOR_KEY))
    kept = cursors[uri]["decisions"]
    cursors[uri]["items"] = [item for item in cursors[uri]["items"] if not item.startswith(("version/", "decision/"))]
    run.store.put(CURSOR_KEY, json.dumps(cursors).encode())
    catch_up(RunFolder(run.url), config)
    assert json.loads(run.store.read(CURSOR_KEY))[uri]["decisions"] == kept
    assert registry.version(MODEL, "3") is None
    assert len(promotions(run)) == 2
    assert aliases(uri, MODEL)["champion"] == "1"


def test_decision_that_was_cut_off_before_the_alias_moved_is_carried_out_later(run: RunFolder, config: Config) -> None:
    uri = str(config.tracking.uri)
    enter(run, config, "n2", 3.0, 3.1)
    enter(run, config, "n3", 2.0, 2.1)
    undo(run, config, "n3")
    first = ModelRegistry(uri).version(MODEL, "1")
    assert first is not None
    ModelRegistry(uri).set_alias("champion", first)
    catch_up(RunFolder(run.url), config)
    assert aliases(uri, MODEL)["champion"] == "2"


def test_decision_made_against_another_champion_does_not_take_the_alias(run: RunFolder, config: Config) -> None:
    uri = str(config.tracking.uri)
    for name, slices in (("n2", (3.0, 3.1)), ("n3", (2.0, 2.1)), ("n4", (1.0, 1.1))):
        enter(run, config, name, *slices)
    assert aliases(uri, MODEL)["champion"] == "3"
    undo(run, config, "n3")
    catch_up(RunFolder(run.url), config)
    assert aliases(uri, MODEL)["champion"] == "3"


def test_older_merge_that_arrives_after_a_newer_one_is_not_the_latest(
    run: RunFolder, config: Config, tmp_path: Path
) -> None:
    shutil.copytree(run.url, tmp_path / "other")
    other = RunFolder(str(tmp_path / "other"))
    enter(run, config, "n4", 3.0, 3.1)
    enter(other, config, "n2", 2.0, 2.1)
    assert aliases(str(config.tracking.uri), MODEL) == {"pma-latest": "1", "champion": "2"}
    assert [event["version"] for event in promotions(other)] == ["2"]


def test_versions_measured_on_other_slices_are_not_compared(run: RunFolder, config: Config) -> None:
    enter(run, config, "n2", 3.0, 3.1)
    longer = override(config, ("evaluation.num_slices=2",))
    enter(run, longer, "n3", 2.0, 2.1)
    assert aliases(str(config.tracking.uri), MODEL)["champion"] == "1"
    assert "was not measured on the same held-out slices" in tags(config, "2")[PROMOTION_TAG]


def test_registration_that_mlflow_has_not_heard_of_is_kept_from_retention_and_sent_later(
    run: RunFolder, config: Config, port: int
) -> None:
    away = override(config, (f"tracking.uri=http://127.0.0.1:{port}",))
    manifest, _ = read_manifest(run.store.child("merged/n3"))
    measure(run, config, manifest.digest, 3.0, 3.1)
    ask_registration(run, f"{run.url}/merged/n3", manifest, config.merge.shard_bytes)
    answer = bring_up_to_date(run, away)
    assert answer["error"] is not None
    assert manifest.digest in registered_digests(run.store)
    catch_up(run, config)
    assert aliases(str(config.tracking.uri), MODEL) == {"pma-latest": "1", "champion": "1"}


def test_no_champion_where_none_is_asked_for(run: RunFolder, config: Config) -> None:
    config = override(config, ("tracking.champion_alias=null",))
    enter(run, config, "n2", 3.0, 3.1)
    assert aliases(str(config.tracking.uri), MODEL) == {"pma-latest": "1"}
