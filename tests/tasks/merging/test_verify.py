"""Every lie about a merge is found and named; an honest one passes in every dtype."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.fan_out import fan_out_local
from configs.errors import UserError
from tasks.checkpoints.reader import open_checkpoint
from tasks.merging.merge import execute_merge
from tasks.merging.methods import MethodChoice
from tasks.merging.plan import plan_merge
from tasks.merging.verify import verify_checkpoint

SaveFolder = Callable[..., str]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def tensors(seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (64, 33), "model.layers.0.mlp.gate.weight": (8, 33), "tiny": (1,)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


@pytest.fixture
def merged(save_folder: SaveFolder, tmp_path: Path) -> Callable[..., Path]:
    """Merge three plain folders and return the merged one."""

    def make(dtype: torch.dtype = torch.float32, output_dtype: str | None = None) -> Path:
        inputs = [open_checkpoint(save_folder(f"input-{n}", tensors(n, dtype))) for n in range(3)]
        plan = plan_merge(inputs, MethodChoice(method="wma"), output_url=str(tmp_path / "merged"), dtype=output_dtype)
        execute_merge(plan, lambda function, tasks: fan_out_local(function, tasks, num_workers=1), lambda: None)
        return tmp_path / "merged"

    return make


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def problems_of(folder: Path, check: str) -> str:
    found = verify_checkpoint(str(folder))
    assert found.checks[check], found.checks
    return "; ".join(found.checks[check])


@pytest.mark.parametrize("dtype", DTYPES)
def test_verify_honest_merge_holds(merged: Callable[..., Path], dtype: torch.dtype) -> None:
    assert verify_checkpoint(str(merged(dtype))).problems == []


def test_verify_honest_merge_of_float32_written_as_bfloat16_holds(merged: Callable[..., Path]) -> None:
    assert verify_checkpoint(str(merged(torch.float32, "bfloat16"))).problems == []


def test_verify_flipped_byte_names_the_tensor(merged: Callable[..., Path]) -> None:
    folder = merged()
    shard = next(folder.glob("model-*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert "differs from its digest" in problems_of(folder, "shards")
    assert "tensor '" in problems_of(folder, "shards")


def test_verify_edited_weight_is_found_by_rule_identity_and_recomputation(merged: Callable[..., Path]) -> None:
    folder = merged()
    edit_manifest(folder, lambda values: values["weights"].__setitem__(slice(0, 2), [0.2, 0.3]))
    assert "weight 1 is 0.2" in problems_of(folder, "weights")
    assert "identity" in problems_of(folder, "lineage")
    assert "the inputs give" in problems_of(folder, "recomputed sample")


def test_verify_input_replaced_since_is_named(merged: Callable[..., Path], tmp_path: Path) -> None:
    folder = merged()
    path = tmp_path / "input-1" / "model.safetensors"
    changed = load_file(path)
    changed["tiny"] += 1
    save_file(changed, path, metadata={"format": "pt"})
    assert "input-1: content digest" in problems_of(folder, "lineage")


def test_verify_missing_tensor_in_an_input_is_named(merged: Callable[..., Path], tmp_path: Path) -> None:
    folder = merged()
    path = tmp_path / "input-2" / "model.safetensors"
    fewer = load_file(path)
    del fewer["tiny"]
    save_file(fewer, path, metadata={"format": "pt"})
    assert "'tiny'" in problems_of(folder, "census")


def test_verify_wrong_dtype_in_the_manifest_is_named(merged: Callable[..., Path]) -> None:
    folder = merged(torch.bfloat16)

    def lie(values: dict[str, Any]) -> None:
        values["shards"][0]["tensors"][0]["dtype"] = "F16"

    edit_manifest(folder, lie)
    assert "content digest" in problems_of(folder, "content digest")
    assert "the header says" in problems_of(folder, "shards")


def test_verify_manifest_of_another_merge_is_found(merged: Callable[..., Path], tmp_path: Path) -> None:
    folder = merged()
    before = (folder / "manifest.json").read_text()
    other = tmp_path / "other"
    inputs = [open_checkpoint(str(tmp_path / f"input-{n}")) for n in (0, 1)]
    plan = plan_merge(inputs, MethodChoice(method="sma"), output_url=str(other))
    execute_merge(plan, lambda function, tasks: fan_out_local(function, tasks, num_workers=1), lambda: None)
    (other / "manifest.json").write_text(before)
    assert "differs from its digest" in problems_of(other, "shards")


def test_verify_edited_index_is_found(merged: Callable[..., Path]) -> None:
    folder = merged()
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["tiny"]
    path.write_text(json.dumps(index))
    assert "'tiny'" in problems_of(folder, "index")
    assert "model.safetensors.index.json" in problems_of(folder, "files")


def test_verify_deleted_shard_is_found(merged: Callable[..., Path]) -> None:
    folder = merged()
    next(folder.glob("model-*.safetensors")).unlink()
    assert "does not exist" in problems_of(folder, "shards")


def test_verify_folder_without_manifest_is_refused(save_folder: SaveFolder) -> None:
    with pytest.raises(UserError, match="no manifest"):
        verify_checkpoint(save_folder("plain", tensors(0, torch.float32)))
