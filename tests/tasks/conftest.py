"""Small real checkpoints: plain Hugging Face folders, and snapshots with a manifest."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from cluster.storage import Store, open_store
from tasks.checkpoints.digest import digest_bytes
from tasks.checkpoints.groups import group_names
from tasks.checkpoints.manifest import Manifest, model_digest, state_digest
from tasks.checkpoints.safetensors_header import TensorEntry
from tasks.checkpoints.writer import commit_manifest, write_shard, write_side_files

Tensors = Mapping[str, torch.Tensor]
SAFETENSORS_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@pytest.fixture
def memory_store() -> Store:
    """An empty store in memory."""
    return open_store(f"memory://{uuid.uuid4().hex}")


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A process group of this process alone, on one thread."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def save_folder(tmp_path: Path) -> Callable[..., str]:
    """Write a plain Hugging Face folder with the safetensors library: ``save_folder(name, tensors, ...)``.

    One mapping of tensors makes ``model.safetensors``; several make numbered files and an index.
    """

    def save(name: str, *files: Tensors, config: dict[str, Any] | None = None) -> str:
        folder = tmp_path / name
        folder.mkdir()
        if len(files) == 1:
            save_file(dict(files[0]), folder / "model.safetensors", metadata={"format": "pt"})
        else:
            weight_map = {}
            for number, tensors in enumerate(files, start=1):
                key = f"model-{number:05d}-of-{len(files):05d}.safetensors"
                save_file(dict(tensors), folder / key, metadata={"format": "pt"})
                weight_map |= dict.fromkeys(tensors, key)
            index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config))
        return str(folder)

    return save


@pytest.fixture
def commit_snapshot() -> Callable[..., Manifest]:
    """Write and commit a snapshot with a manifest: ``commit_snapshot(store, model_tensors, step=..., ...)``."""

    def commit(store: Store, model: Tensors, *, state: Tensors | None = None, step: int = 1, **fields: Any) -> Manifest:
        shards = [_write(store, "model-00001-of-00001.safetensors", model, "model")]
        if state is not None:
            shards.append(_write(store, "state-00001-of-00001.safetensors", state, "state"))
        scalars = {"step": step}
        small = {"config.json": b'{"model_type": "tiny", "dtype": "float32"}'}
        files = write_side_files(store, small, shards, lambda: None)
        manifest = Manifest(
            **{
                "kind": "training",
                "step": step,
                "tokens_seen": step * 100,
                "digest": model_digest(tuple(shards)),
                "state_digest": state_digest(tuple(shards), scalars) if state is not None else None,
                "shards": tuple(shards),
                "files": tuple(files),
                "parameter_groups": group_names(sorted(model)),
                "phase": "stable",
                "learning_rate": 1e-3,
                "run_id": "run",
                **fields,
            }
        )
        return commit_manifest(store, manifest, lambda: None)

    return commit


def _write(store: Store, key: str, tensors: Tensors, part: Any) -> Any:
    def chunks_of(entry: TensorEntry) -> list[bytes]:
        return [raw_bytes(tensors[entry.name])]

    specs = [(name, SAFETENSORS_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in sorted(tensors.items())]
    shard = write_shard(store, key, specs, chunks_of, part)
    assert digest_bytes(store.read(shard.key)) == shard.digest
    return shard


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """Little-endian row-major bytes of a tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
