"""What MLflow shows of a run beyond metrics: datasets with digests, charts, descriptions, and a tree that stays small."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from local_gang import train
from registered import catch_up, make_database
from short_run import SMALL, small

from configs.errors import ConfigError
from configs.load import config_to_dict, identity_of, load_config, override
from configs.schema import Config
from pipelines.tracked.charts import draw, pending_charts
from pipelines.tracked.datasets import RECORD_KEY, find_facts
from pipelines.tracked.tree import SIBLINGS, TOP, kind_of, name_of, parent_of
from tasks.checkpoints.run_folder import RunFolder
from tasks.evaluation.held_out import EvaluationTask, evaluate_checkpoints, suite_of

MIXED = (
    "data.mixture=[{name: code, sources: ['tests/*.py'], weight: 3}, {name: docs, sources: ['docs/*.md'], weight: 1}]"
)


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, Config, str]:
    """A run of 20 steps on two domains, evaluated, and sent to MLflow; the run, its configuration, the server."""
    folder = tmp_path_factory.mktemp("tracked")
    shape = [item for item in SMALL if not item.startswith("data.sources")]
    config = load_config("tiny", (*shape, "training.total_tokens=2560", MIXED)).config
    run = RunFolder(str(folder / "run"))
    run.begin(config)
    train(run, config)
    urls = tuple(snapshot.url for snapshot in run.snapshots())
    evaluate_checkpoints(EvaluationTask(run_url=run.url, config=config_to_dict(config), urls=urls))
    cells = [cell(count, loss) for count, loss in ((2, 3.0), (3, 2.9))]
    end = {
        "step": 20, "raw_loss": 3.1, "best": "n3", "chosen": "n2", "not_told_apart": ["n2", "n3"],
        "spans": [{"span_tokens": 1280, "loss": 3.0, "cells": 1}, {"span_tokens": 2560, "loss": 2.9, "cells": 1}],
        "recommended": {"method": "sma", "count": 2, "interval_tokens": 1280},
    }  # fmt: skip
    record = {"run": run.url, "grid": {}, "cells": cells, "ends": [end], "lacking": []}
    run.store.put("ablations/abc.json", json.dumps(record).encode())
    config = override(config, (f"tracking.uri={make_database(folder)}",))
    catch_up(run, config)
    return run, config, str(config.tracking.uri)


def cell(count: int, loss: float) -> dict[str, object]:
    return {
        "name": f"n{count}", "method": "sma", "alpha": None, "count": count, "interval_tokens": 1280,
        "span_tokens": (count - 1) * 1280, "end_step": 20, "digest": "d", "loss": loss, "gain": 0.1, "gain_error": 0.01,
    }  # fmt: skip


def test_every_domain_and_the_held_out_suite_are_dataset_inputs_with_digests(
    tracked: tuple[RunFolder, Config, str],
) -> None:
    from mlflow import MlflowClient

    run, config, uri = tracked
    client = MlflowClient(tracking_uri=uri)
    top = json.loads(run.store.read("tracking/cursor.json"))[uri]["runs"]["run"]
    inputs = client.get_run(top).inputs.dataset_inputs
    found = {item.dataset.name: (item.dataset, item.tags[0].value) for item in inputs}
    assert {name: context for name, (_, context) in found.items()} == {
        "code": "training",
        "docs": "training",
        "held-out": "evaluation",
    }
    facts = {item.name: item for item in find_facts(config)}
    for name in ("code", "docs"):
        assert found[name][0].digest == facts[name].digest[:36]
        assert json.loads(found[name][0].source)["sources"] == list(facts[name].sources)
    assert json.loads(found["docs"][0].profile)["num_files"] == len(list(Path("docs").glob("*.md")))
    position = json.loads((Path(run.snapshots()[0].url) / "state.json").read_text())["data_position"]
    assert json.loads(found["code"][0].profile)["content_digest"] == position["corpus_digest"]
    assert json.loads(found["held-out"][0].source)["suite"] == suite_of(config)


def test_dataset_digest_follows_names_and_sizes_and_is_kept_as_the_run_first_had_it(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("first")
    config = override(small(), (f"data.sources=['{tmp_path}/data/*.txt']",))
    (before,) = find_facts(config)
    assert (before.num_files, before.num_bytes) == (1, 5)
    (tmp_path / "data" / "b.txt").write_text("second")
    (after,) = find_facts(config)
    assert (after.num_files, after.num_bytes) == (2, 11)
    assert after.digest != before.digest
    (tmp_path / "data" / "b.txt").unlink()
    (tmp_path / "data" / "a.txt").touch()
    assert find_facts(config)[0].digest == before.digest
    (tmp_path / "data" / "a.txt").unlink()
    (gone,) = find_facts(config)
    assert gone.by.startswith("names of the sources alone")


def test_charts_and_ablation_are_artifacts_and_sent_once(tracked: tuple[RunFolder, Config, str]) -> None:
    from mlflow import MlflowClient

    run, config, uri = tracked
    client = MlflowClient(tracking_uri=uri)
    cursor = json.loads(run.store.read("tracking/cursor.json"))[uri]
    top = cursor["runs"]["run"]
    folders = ("charts", "charts/ablation-abc", "ablations")
    paths = {item.path for folder in folders for item in client.list_artifacts(top, folder) if not item.is_dir}
    assert paths == {
        "charts/held-out-loss.svg",
        "charts/ablation-abc/sma-windows-that-end-at-step-20.svg",
        "charts/ablation-abc/span-step-000000020.svg",
        "ablations/abc.json",
    }
    metrics = client.get_run(top).data.metrics
    assert (metrics["ablation/best_loss"], metrics["ablation/chosen_loss"]) == (2.9, 3.0)
    assert (metrics["ablation/chosen_count"], metrics["ablation/chosen_interval_tokens"]) == (2, 1280)
    again = catch_up(RunFolder(run.url), config)
    assert again["lag"] == 0
    assert json.loads(run.store.read("tracking/cursor.json"))[uri]["items"] == cursor["items"]
    assert json.loads(run.store.read(RECORD_KEY))[0]["name"] == "code"


def test_description_of_the_run_begins_with_the_answer_and_names_where_things_lie(
    tracked: tuple[RunFolder, Config, str],
) -> None:
    from mlflow import MlflowClient

    run, _, uri = tracked
    client = MlflowClient(tracking_uri=uri)
    runs = json.loads(run.store.read("tracking/cursor.json"))[uri]["runs"]
    note = client.get_run(runs["run"]).data.tags["mlflow.note.content"].splitlines()
    assert note[0].startswith("**Held-out loss at step 20: raw ")
    assert f"- run folder: `{run.url}`" in note
    assert client.get_run(runs["run"]).data.tags["mlflow.runName"] == "tiny (run)"
    segment = client.get_run(runs["segment/1"]).data.tags
    assert segment["mlflow.note.content"] == "Training from step 0; begun by: start."


def test_chart_is_one_svg_document_without_scripts_or_links(tracked: tuple[RunFolder, Config, str]) -> None:
    run, config, _ = tracked
    for item in pending_charts(run, config, set(), is_branch=False):
        found = draw(run, config, item)
        for path, text in (found.artifacts if found else {}).items():
            if path.endswith(".svg"):
                assert ElementTree.fromstring(text).tag.endswith("svg"), path
                assert "<script" not in text and 'href="http' not in text


def test_comparison_without_a_curve_has_no_chart(tracked: tuple[RunFolder, Config, str], tmp_path: Path) -> None:
    _, config, _ = tracked
    run = RunFolder(str(tmp_path / "stage"))
    run.store.put("comparisons/none.json", json.dumps({"seeds": [{"seed": 1, "curve": []}], "time": 0.0}).encode())
    assert draw(run, config, "chart/comparison@none") is None


@given(
    st.lists(
        st.one_of(
            st.integers(1, 300).map(lambda n: f"segment/{n}"),
            st.integers(1, 300).map(lambda n: f"branches/anneal-from-step-{n:09d}"),
            st.integers(1, 300).map(lambda n: f"branches/seed-{n}"),
            st.sampled_from(["merges", "evaluations"]),
        ),
        unique=True,
        max_size=80,
    )
)
def test_no_order_of_arrival_gives_the_run_more_than_fourteen_children(keys: list[str]) -> None:
    parents: dict[str, str | None] = {TOP: None}
    for key in keys:
        above = parent_of(key, parents)
        assert above is not None
        if above not in parents:
            parents[above] = parent_of(above, parents)
        parents[key] = above
    children = [key for key, above in parents.items() if above == TOP]
    assert len(children) <= 3 * (SIBLINGS + 1) + 2
    assert all(parents[str(above)] in (TOP, None) for above in parents.values() if above is not None)


@pytest.mark.parametrize(
    ("key", "name", "kind"),
    [
        ("run", "tiny (first)", "run"),
        ("segment/2", "segment 2", "segment"),
        ("branches/anneal-from-step-000001200", "anneal from step 1,200", "anneal"),
        ("branches/control", "control", "branch"),
        ("branches/control-seed-2", "control, seed 2", "branch"),
        ("branches/seed-3", "seed 3", "branch"),
        ("branches/hotter", "hotter", "branch"),
        ("group/anneal", "more annealing branches", "group"),
        ("merges", "merges", "merges"),
    ],
)
def test_runs_are_called_what_people_would_call_them(key: str, name: str, kind: str) -> None:
    assert (name_of(key, "tiny", "s3://bucket/runs/first"), kind_of(key)) == (name, kind)


def test_promotion_keys_take_no_part_in_the_identity_of_runs() -> None:
    plain = load_config("tiny").config
    other = load_config("tiny", ("tracking.champion_alias=best", "tracking.champion_margin_errors=2")).config
    assert identity_of(plain) == identity_of(other)


@pytest.mark.parametrize("alias", ["latest", "Latest", "v1", "pma-latest", "a.b", "''"])
def test_champion_alias_that_mlflow_or_we_use_otherwise_is_refused(alias: str) -> None:
    with pytest.raises(ConfigError, match=r"tracking\.champion_alias"):
        load_config("tiny", (f"tracking.champion_alias={alias}",))
