"""A merged checkpoint is made again from its MLflow record alone, or it is said why it cannot be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from local_gang import train
from registered import make_database, make_merge, register, uri_of
from short_run import begin
from stage_arms import plain_copy

from cluster.model_registry import ModelRegistry
from cluster.tracking import TrackingAway
from configs.errors import UserError
from configs.schema import Config
from pipelines.adopt import adopt
from pipelines.rebuild import rebuild
from pipelines.tracked.registration import LINEAGE_ARTIFACT_TAG, LINEAGE_TAG
from tasks.checkpoints.manifest import read_manifest
from tasks.checkpoints.run_folder import RunFolder
from tasks.merging.verify import verify_checkpoint

MODEL = "pmaflow-tiny"
POLICY = """
moments: merge
buffers: newest
keep_dtype: ["*norm*"]
rules:
  - {tensors: "*.router", method: newest}
  - {tensors: "*embed*", method: weights, weights: [0.5, 0.25, 0.25], write: float32}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 40 steps with four snapshots."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    run, config = begin(folder, "training.total_tokens=5120")
    train(run, config)
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> RunFolder:
    """A copy that the test may damage; its database is beside it."""
    shutil.copytree(trained, tmp_path / "run")
    return RunFolder(str(tmp_path / "run"))


@pytest.fixture
def config(run: RunFolder, tmp_path: Path) -> Config:
    from configs.load import override

    return override(run.identity().config, (f"tracking.uri={make_database(tmp_path)}",))


def snapshots(run: RunFolder, count: int = 3) -> tuple[str, ...]:
    return tuple(snapshot.url for snapshot in run.snapshots()[-count:])


@pytest.mark.parametrize("place", ["in place", "elsewhere"])
def test_merge_that_was_deleted_is_made_again_with_the_same_digest(
    run: RunFolder, config: Config, tmp_path: Path, place: str
) -> None:
    url = make_merge(run, "explicit", inputs=snapshots(run), method="weights", weights="0.5,0.2,0.3")
    digest = register(run, config, url)
    files = {path.name: path.read_bytes() for path in Path(url).glob("*.safetensors")}
    shutil.rmtree(url)
    # The record alone must do: of the run nothing but the snapshots is left.
    for name in ("registrations", "tracking", "run.json", "evaluations", "catalog.json"):
        path = Path(run.url) / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    output = None if place == "in place" else str(tmp_path / "again")
    done = rebuild(f"{MODEL}@pma-latest", output=output, tracking_uri=uri_of(tmp_path))
    assert done["ok"]
    assert (done["digest"], done["expected_digest"], done["version"]) == (digest, digest, "1")
    assert done["output"] == (output or url)
    assert [item["url"] for item in done["inputs"]] == list(snapshots(run))
    assert {path.name: path.read_bytes() for path in Path(done["output"]).glob("*.safetensors")} == files
    assert verify_checkpoint(done["output"]).problems == []
    again = rebuild(f"models:/{MODEL}/1", output=output, tracking_uri=uri_of(tmp_path))
    assert (again["ok"], again["is_new"], again["bytes_read"]) == (True, False, 0)


def test_merge_by_a_policy_file_is_made_again_with_its_training_state(
    run: RunFolder, config: Config, tmp_path: Path
) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text(POLICY)
    options = {"method": "ema", "alpha": 0.3, "dtype": "bfloat16", "policy": str(policy)}
    url = make_merge(run, "by-policy", inputs=snapshots(run), **options)
    register(run, config, url)
    before, _ = read_manifest(run.store.child("merged/by-policy"))
    policy.unlink()
    shutil.rmtree(url)
    done = rebuild(f"{MODEL}/1", tracking_uri=uri_of(tmp_path))
    after, _ = read_manifest(run.store.child("merged/by-policy"))
    assert done["ok"]
    assert before.state_digest is not None
    assert (after.digest, after.state_digest) == (before.digest, before.state_digest)
    assert after.merge == before.merge


def test_merge_of_adopted_and_of_plain_checkpoints_is_made_again(
    run: RunFolder, config: Config, tmp_path: Path
) -> None:
    for step, snapshot in enumerate(run.snapshots(), start=1):
        plain_copy(snapshot.url, tmp_path / f"foreign-{step}")
    adopt(str(tmp_path / "adopted"), f"{tmp_path}/foreign-{{step}}", format_="hf", tokens_per_step=128)
    adopted = RunFolder(str(tmp_path / "adopted"))
    mixed = (*(s.url for s in adopted.snapshots()[:3]), str(tmp_path / "foreign-4"))
    url = make_merge(run, "mixed", inputs=mixed, method="wma")
    register(run, config, url)
    shutil.rmtree(url)
    # Files that were touched, and hold what they held, are the same.
    (tmp_path / "foreign-4" / "model.safetensors").touch()
    done = rebuild(f"{MODEL}@pma-latest", tracking_uri=uri_of(tmp_path))
    assert done["ok"]
    assert done["digest"] == done["expected_digest"]


def test_inputs_that_are_gone_or_were_replaced_are_named_and_nothing_is_written(
    run: RunFolder, config: Config, tmp_path: Path
) -> None:
    first, second, third, fourth = (Path(url) for url in snapshots(run, 4))
    plain = plain_copy(str(first), tmp_path / "plain")
    url = make_merge(run, "sma", inputs=(plain, str(second), str(third), str(fourth)))
    register(run, config, url)
    shutil.rmtree(url)
    shutil.rmtree(second)
    shutil.rmtree(third)
    shutil.copytree(fourth, third)
    with pytest.raises(UserError) as found:
        rebuild(f"{MODEL}/1", tracking_uri=uri_of(tmp_path))
    message = str(found.value)
    assert "2 of 4 inputs are gone or were replaced" in message
    assert f"  {second}: no checkpoint here" in message
    assert f"{third}: holds content" in message
    assert not Path(url).exists()


def test_plain_input_whose_bytes_were_replaced_is_named_before_work(
    run: RunFolder, config: Config, tmp_path: Path
) -> None:
    first, second, third = snapshots(run)
    plain = plain_copy(first, tmp_path / "plain")
    url = make_merge(run, "sma", inputs=(plain, second, third))
    register(run, config, url)
    shutil.rmtree(url)
    shutil.rmtree(plain)
    plain_copy(third, tmp_path / "plain")
    with pytest.raises(UserError, match=f"(?s)1 of 3 inputs.*{plain}: holds content .* it was replaced since"):
        rebuild(f"{MODEL}/1", tracking_uri=uri_of(tmp_path))
    assert not Path(url).exists()


def test_result_with_another_digest_fails_with_both_and_is_taken_away(
    run: RunFolder, config: Config, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    url = make_merge(run, "sma", inputs=snapshots(run))
    digest = register(run, config, url)
    client = MlflowClient(tracking_uri=uri_of(tmp_path))
    record = json.loads(client.get_model_version(MODEL, "1").tags[LINEAGE_TAG])
    client.set_model_version_tag(MODEL, "1", LINEAGE_TAG, json.dumps({**record, "digest": "0" * 64}))
    output = tmp_path / "again"
    done = rebuild(f"{MODEL}/1", output=str(output), tracking_uri=uri_of(tmp_path))
    assert (done["ok"], done["digest"], done["expected_digest"]) == (False, digest, "0" * 64)
    assert done["taken_away"]
    assert not [path for path in output.rglob("*") if path.name == "manifest.json" or path.suffix == ".safetensors"]
    # What stands there and was not made now stays.
    kept = rebuild(f"{MODEL}/1", tracking_uri=uri_of(tmp_path))
    assert (kept["ok"], kept["taken_away"]) == (False, False)
    assert (Path(url) / "manifest.json").exists()


def test_record_too_long_for_a_tag_is_read_from_the_run(
    run: RunFolder, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.tracked.registration.LARGEST_TAG", 200)
    url = make_merge(run, "sma", inputs=snapshots(run))
    register(run, config, url)
    version = ModelRegistry(uri_of(tmp_path)).version(MODEL, "1")
    assert version is not None
    assert LINEAGE_TAG not in version.tags
    assert LINEAGE_ARTIFACT_TAG in version.tags
    shutil.rmtree(url)
    assert rebuild(f"{MODEL}/1", tracking_uri=uri_of(tmp_path))["ok"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (f"{MODEL}@champoin", r"has no alias 'champoin'; it has pma-latest \(version 1\)"),
        ("nobody@champion", "no registered model 'nobody'"),
        (f"{MODEL}/7", "has no version 7"),
        (MODEL, "expected NAME@ALIAS or NAME/VERSION"),
    ],
)
def test_model_that_is_not_there_is_a_mistake_that_says_what_is(
    run: RunFolder, config: Config, tmp_path: Path, asked: str, message: str
) -> None:
    register(run, config, make_merge(run, "sma", inputs=snapshots(run)))
    with pytest.raises(UserError, match=message):
        rebuild(asked, tracking_uri=uri_of(tmp_path))


def test_server_that_does_not_answer_and_a_database_that_is_not_there_are_told_apart(
    tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TrackingAway, match=f"MLflow at http://127.0.0.1:{port}"):
        rebuild(f"{MODEL}@champion", tracking_uri=f"http://127.0.0.1:{port}")
    with pytest.raises(UserError, match="there is no file"):
        rebuild(f"{MODEL}@champion", tracking_uri=uri_of(tmp_path))
    assert not (tmp_path / "mlflow.db").exists()
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match="give --tracking-uri, or set MLFLOW_TRACKING_URI"):
        rebuild(f"{MODEL}@champion")
