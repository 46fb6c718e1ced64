"""The manifest: what goes in comes out, and damage is named."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest

from cluster.errors import ObjectMissing
from cluster.storage import Store
from tasks.checkpoints.digest import content_digest, digest_bytes
from tasks.checkpoints.manifest import (
    FORMAT_VERSION,
    MANIFEST_KEY,
    LossStatistics,
    Manifest,
    Merge,
    MergeInput,
    Shard,
    SideFile,
    encode_manifest,
    model_digest,
    parse_manifest,
    read_manifest,
    state_digest,
)
from tasks.checkpoints.safetensors_header import CheckpointError, TensorEntry

URL = "s3://bucket/run/snapshots/step-000000100/manifest.json"


def shard(part: Any, *names: str) -> Shard:
    tensors = tuple(
        TensorEntry(
            name=name, dtype="F32", shape=(2, 3), offset=96 + 24 * i, bytes=24, digest=digest_bytes(name.encode())
        )
        for i, name in enumerate(names)
    )
    return Shard(key=f"{part}-1.safetensors", part=part, bytes=96 + 24 * len(names), digest="d", tensors=tensors)


MODEL, STATE = shard("model", "a", "b"), shard("state", "exp_avg.a", "exp_avg.b")
TRAINING = Manifest(
    kind="training",
    step=100,
    tokens_seen=204_800,
    digest=model_digest((MODEL, STATE)),
    state_digest=state_digest((MODEL, STATE), {"step": 100}),
    shards=(MODEL, STATE),
    files=(SideFile(key="config.json", bytes=2, digest="c"),),
    parameter_groups={"a": ["a"], "b": ["b"]},
    phase="stable",
    learning_rate=3e-3,
    loss=LossStatistics(mean=2.5, maximum=3.0, last=2.4, gradient_norm_mean=0.5, steps=50, nonfinite_steps=0),
    healthy=True,
    run_id="run",
    segment=2,
    code_version="0.1.0",
    created=1.5,
)
MERGED = dataclasses.replace(
    TRAINING,
    kind="merged",
    state_digest=None,
    shards=(MODEL,),
    loss=None,
    merge=Merge(
        method="ema",
        alpha=0.2,
        inputs=(
            MergeInput(url="/a", digest="1", manifest_digest="2", step=50, tokens_seen=102_400),
            MergeInput(url="/b", digest="3", manifest_digest=None, step=None, tokens_seen=None),
        ),
        weights=(0.8, 0.2),
        dtypes={"read": "stored", "write": "bfloat16"},
        policies={"weights": "method"},
        identity="identity",
    ),
)


def parse_changed(manifest: Manifest, change: Callable[[dict[str, Any]], object]) -> Manifest:
    values = json.loads(encode_manifest(manifest))
    change(values)
    return parse_manifest(json.dumps(values).encode(), URL)


@pytest.mark.parametrize("manifest", [TRAINING, MERGED], ids=["training", "merged"])
def test_manifest_round_trip_is_equal(manifest: Manifest) -> None:
    assert parse_manifest(encode_manifest(manifest), URL) == manifest


def test_manifest_merge_fields_lie_at_top_level() -> None:
    values = json.loads(encode_manifest(MERGED))
    assert values["inputs"][0]["url"] == "/a"
    assert (values["method"], values["weights"], values["kind"]) == ("ema", [0.8, 0.2], "merged")
    assert (values["format_version"], values["digest"]) == (FORMAT_VERSION, MERGED.digest)
    assert "merge" not in values


def test_manifest_floats_survive_exactly() -> None:
    weights = (1 / 3, 0.1, 1 - 1 / 3 - 0.1)
    merged = dataclasses.replace(MERGED, merge=dataclasses.replace(MERGED.merge, weights=weights))
    parsed = parse_manifest(encode_manifest(merged), URL)
    assert parsed.merge is not None
    assert parsed.merge.weights == weights


def test_manifest_nonfinite_number_refused() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        encode_manifest(dataclasses.replace(TRAINING, learning_rate=float("nan")))


def test_manifest_tensors_of_each_part() -> None:
    assert [tensor.name for tensor in TRAINING.model_tensors()] == ["a", "b"]
    assert [tensor.name for tensor in TRAINING.state_tensors()] == ["exp_avg.a", "exp_avg.b"]


@pytest.mark.parametrize("data", [b"", b"{", b"not JSON", b"\xff\xfe\x00", b"[]", b"null", b"5", b"{}", b'{"a": 1}'])
def test_parse_manifest_not_a_manifest_refused_with_url(data: bytes) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse_manifest(data, URL)
    assert URL in str(caught.value)


@pytest.mark.parametrize("version", [0, 2, None, "1"])
def test_parse_manifest_other_format_version_refused(version: object) -> None:
    with pytest.raises(CheckpointError, match=f"format_version {version!r}; this version reads 1"):
        parse_changed(TRAINING, lambda values: values.update(format_version=version))


@pytest.mark.parametrize("field", ["kind", "step", "digest", "state_digest", "shards", "files", "parameter_groups"])
def test_parse_manifest_field_missing_is_named(field: str) -> None:
    with pytest.raises(CheckpointError, match=f"damaged.*{field}"):
        parse_changed(TRAINING, lambda values: values.pop(field))


@pytest.mark.parametrize("field", ["key", "part", "bytes", "digest", "tensors"])
def test_parse_manifest_field_of_a_shard_missing_is_named(field: str) -> None:
    with pytest.raises(CheckpointError, match=f"damaged.*{field}"):
        parse_changed(TRAINING, lambda values: values["shards"][0].pop(field))


@pytest.mark.parametrize("field", ["name", "dtype", "shape", "offset", "bytes"])
def test_parse_manifest_field_of_a_tensor_missing_is_named(field: str) -> None:
    with pytest.raises(CheckpointError, match=f"damaged.*{field}"):
        parse_changed(TRAINING, lambda values: values["shards"][0]["tensors"][0].pop(field))


@pytest.mark.parametrize("field", ["method", "alpha", "inputs", "weights", "dtypes", "policies", "identity"])
def test_parse_manifest_field_of_the_merge_missing_is_named(field: str) -> None:
    with pytest.raises(CheckpointError, match=f"damaged.*{field}"):
        parse_changed(MERGED, lambda values: values.pop(field))


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.update(unheard_of=1),
        lambda values: values["shards"][0].update(unheard_of=1),
        lambda values: values["shards"][0]["tensors"][0].update(unheard_of=1),
        lambda values: values["files"][0].update(unheard_of=1),
        lambda values: values["loss"].update(unheard_of=1),
    ],
    ids=["manifest", "shard", "tensor", "file", "loss"],
)
def test_parse_manifest_unknown_field_is_named(change: Callable[[dict[str, Any]], object]) -> None:
    with pytest.raises(CheckpointError, match=r"damaged.*unheard_of"):
        parse_changed(TRAINING, change)


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.update(shards=None),
        lambda values: values.update(shards=[1]),
        lambda values: values.update(files=5),
        lambda values: values["shards"][0].update(tensors=[None]),
        lambda values: values["shards"][0]["tensors"][0].update(shape=3),
    ],
)
def test_parse_manifest_wrong_structure_refused(change: Callable[[dict[str, Any]], object]) -> None:
    with pytest.raises(CheckpointError, match="damaged"):
        parse_changed(TRAINING, change)


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.update(step="100"),
        lambda values: values.update(digest=5),
        lambda values: values.update(kind="unheard of"),
        lambda values: values.update(healthy="false"),
        lambda values: values["shards"][0].update(key=5),
        lambda values: values["shards"][0].update(part="other"),
        lambda values: values["shards"][0]["tensors"][0].update(offset="96"),
        lambda values: values["shards"][0]["tensors"][0].update(offset=-1),
        lambda values: values["shards"][0]["tensors"][0].update(shape="23"),
        lambda values: values["shards"][0]["tensors"][0].update(dtype="F4"),
    ],
)
def test_parse_manifest_wrong_type_refused(change: Callable[[dict[str, Any]], object]) -> None:
    with pytest.raises(CheckpointError):
        parse_changed(TRAINING, change)


def test_model_digest_is_of_the_model_part_alone() -> None:
    assert model_digest((MODEL, STATE)) == model_digest((MODEL,)) == content_digest(MODEL.tensors)
    assert model_digest((STATE,)) == content_digest([])


def test_model_digest_split_into_files_does_not_matter() -> None:
    split = tuple(dataclasses.replace(MODEL, key=tensor.name, tensors=(tensor,)) for tensor in MODEL.tensors)
    assert model_digest(split) == model_digest((MODEL,))


def test_state_digest_depends_on_tensors_and_scalars() -> None:
    other = dataclasses.replace(STATE, tensors=(dataclasses.replace(STATE.tensors[0], digest="0"), STATE.tensors[1]))
    digests = {
        state_digest((MODEL, STATE), {"step": 100}),
        state_digest((MODEL, STATE), {"step": 101}),
        state_digest((MODEL, other), {"step": 100}),
    }
    assert len(digests) == 3
    assert state_digest((STATE,), {"step": 100}) == state_digest((MODEL, STATE), {"step": 100})


@pytest.mark.parametrize(("nonfinite_steps", "healthy"), [(0, True), (1, False)])
def test_loss_statistics_healthy_only_if_every_step_was_finite(nonfinite_steps: int, healthy: bool) -> None:
    assert TRAINING.loss is not None
    assert dataclasses.replace(TRAINING.loss, nonfinite_steps=nonfinite_steps).healthy is healthy


def test_read_manifest_gives_the_digest_of_its_bytes(memory_store: Store) -> None:
    memory_store.put(MANIFEST_KEY, encode_manifest(TRAINING))
    assert read_manifest(memory_store) == (TRAINING, digest_bytes(encode_manifest(TRAINING)))


def test_read_manifest_folder_without_one_is_missing(memory_store: Store) -> None:
    with pytest.raises(ObjectMissing):
        read_manifest(memory_store)
