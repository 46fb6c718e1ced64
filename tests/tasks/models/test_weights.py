"""Loading holds what it reads against the manifest, whatever the dtype of the network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cluster.storage import open_store
from tasks.checkpoints.reader import open_checkpoint
from tasks.checkpoints.safetensors_header import CheckpointError
from tasks.evaluation.held_out import build_network
from tasks.models import weights
from tasks.models.disk_layout import model_tensors, pieces_of
from tasks.models.weights import load_weights
from tests.network_run import commit_network, damage, disk_tensors, network_config


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("read_bytes", [64, 1 << 26])
def test_network_holds_the_stored_values_in_its_dtype(
    tmp_path: Path, dtype: str, read_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "READ_BYTES", read_bytes)
    config = network_config(f"evaluation.dtype={dtype}")
    commit_network(open_store(str(tmp_path)), config, seed=5, step=1)
    network, expected = build_network(config), disk_tensors(config, 5)
    load_weights(network, open_checkpoint(str(tmp_path)))
    for name, tensor in model_tensors(network).items():
        assert tensor.dtype == getattr(torch, dtype)
        for piece in pieces_of(name, tensor.shape):
            assert torch.equal(piece.of(tensor), expected[piece.disk_name].to(tensor.dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_flipped_bit_is_refused_with_the_tensor(tmp_path: Path, dtype: str) -> None:
    config, store = network_config(f"evaluation.dtype={dtype}"), open_store(str(tmp_path))
    commit_network(store, config, seed=5, step=1)
    damage(store, "model-00001-of-00001.safetensors")
    last = open_checkpoint(store.url).manifest.shards[0].tensors[-1].name
    with pytest.raises(CheckpointError, match=rf"tensor '{last}' has digest \w+, its manifest says"):
        load_weights(build_network(config), open_checkpoint(store.url))
