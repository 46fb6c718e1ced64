"""A checkpoint as a folder that transformers loads, from this machine and from object storage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.storage import Store, open_store
from configs.data import DataConfig
from configs.errors import UserError
from tasks.checkpoints.reader import open_checkpoint
from tasks.checkpoints.safetensors_header import CheckpointError
from tasks.evaluation.model_folder import write_model_folder
from tests.bpe_tokenizer import train_bpe
from tests.network_run import commit_network, damage, disk_tensors, network_config
from tests.token_data import write_tokens

CONFIG = network_config()
HEAD, SHARD = "lm_head.weight", "model-00001-of-00001.safetensors"


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    url = str(tmp_path / "step") if request.param == "local" else f"memory://{tmp_path.name}"
    commit_network(open_store(url), CONFIG, seed=3, step=1)
    return open_store(url)


def test_transformers_loads_weights_and_bytes(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    write_model_folder(open_checkpoint(store.url), CONFIG.data, folder)
    network = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(network.lm_head.weight, disk_tensors(CONFIG, 3)[HEAD])
    assert AutoTokenizer.from_pretrained(folder)("é\n")["input_ids"] == list("é\n".encode())
    assert (folder / SHARD).is_symlink() == ("://" not in store.url)
    # Nothing is written beside the weights.
    assert not store.exists("tokenizer.json")


def test_changed_shard_is_refused(store: Store, tmp_path: Path) -> None:
    damage(store, SHARD)
    with pytest.raises(CheckpointError, match=f"{SHARD} has digest"):
        write_model_folder(open_checkpoint(store.url), CONFIG.data, tmp_path / "folder")


def test_tokenizer_of_the_run_is_taken_where_the_checkpoint_has_none(store: Store, tmp_path: Path) -> None:
    train_bpe(tmp_path / "tokenizer.json")
    write_model_folder(
        open_checkpoint(store.url), DataConfig(tokenizer=str(tmp_path / "tokenizer.json")), tmp_path / "f"
    )
    assert (tmp_path / "f" / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


def test_own_tokenizer_is_kept(store: Store, tmp_path: Path) -> None:
    store.put("tokenizer.json", b"its own")
    write_model_folder(open_checkpoint(store.url), CONFIG.data, tmp_path / "f")
    assert (tmp_path / "f" / "tokenizer.json").read_bytes() == b"its own"
    assert not (tmp_path / "f" / "tokenizer_config.json").exists()


def test_unknown_tokenizer_and_missing_config_are_refused(store: Store, tmp_path: Path) -> None:
    write_tokens(tmp_path / "a.bin", documents=20)
    with pytest.raises(UserError, match="has no tokenizer"):
        write_model_folder(open_checkpoint(store.url), DataConfig(sources=(str(tmp_path / "a.bin"),)), tmp_path / "f")
    store.delete("config.json")
    with pytest.raises(UserError, match=r"has no config\.json"):
        write_model_folder(open_checkpoint(store.url), CONFIG.data, tmp_path / "f")
