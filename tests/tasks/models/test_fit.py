"""Whether a checkpoint fits a network: names, shapes, and what these do not show."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.errors import UserError
from configs.schema import Config
from tasks.checkpoints.reader import open_checkpoint
from tasks.models.build import build_model
from tasks.models.fit import misfits
from tests.sharded_gang import FAMILIES, Case, case_config


def saved(config: Config, folder: Path) -> Path:
    """The network of ``config`` as transformers saves it."""
    build_model(config.model, config.training.sequence_length, seed=1).save_pretrained(folder)
    return folder


def found(config: Config, folder: Path) -> list[str]:
    return misfits(config, open_checkpoint(str(folder)))


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoint_of_the_same_configuration_fits(family: str, tmp_path: Path) -> None:
    config = case_config(Case(name="a", family=family, overrides=FAMILIES[family]), 1)
    assert found(config, saved(config, tmp_path / "a")) == []


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (("model.num_experts_per_token=1",), "num_experts_per_token"),
        (("model.normalise_top_k=false",), "normalise_top_k"),
        (("model.rope_theta=5000.0",), "rope_theta"),
        (("model.norm_epsilon=1e-5",), "norm_epsilon"),
        (("model.num_attention_heads=2", "model.head_size=16", "model.num_key_value_heads=1"), "num_attention_heads"),
    ],
)
def test_difference_that_no_shape_shows_is_named_by_its_key(
    overrides: tuple[str, ...], key: str, tmp_path: Path
) -> None:
    config = case_config(Case(name="a", family="qwen3_moe", overrides=()), 1)
    other = case_config(Case(name="b", family="qwen3_moe", overrides=overrides), 1)
    lines = found(other, saved(config, tmp_path / "a"))
    assert any(line.startswith(f"model.{key} is ") for line in lines)


def test_key_behind_other_shapes_is_named_before_them(tmp_path: Path) -> None:
    config = case_config(Case(name="a", family="qwen3_moe", overrides=()), 1)
    other = case_config(Case(name="b", family="qwen3_moe", overrides=("model.hidden_size=64",)), 1)
    lines = found(other, saved(config, tmp_path / "a"))
    assert lines[0] == "model.hidden_size is 64, the checkpoint's 32"
    assert any(line.startswith("model.embed_tokens.weight has shape") for line in lines)


def test_keys_that_a_network_does_not_use_are_free(tmp_path: Path) -> None:
    config = case_config(Case(name="a", family="qwen3_moe", overrides=()), 1)
    free = ("model.intermediate_size=512", "model.router_loss_coefficient=0.5", "model.initializer_range=0.1")
    other = case_config(Case(name="b", family="qwen3_moe", overrides=free), 1)
    assert found(other, saved(config, tmp_path / "a")) == []


def test_all_differences_are_listed_at_once(tmp_path: Path) -> None:
    config = case_config(Case(name="a", family="qwen3_moe", overrides=()), 1)
    folder = saved(config, tmp_path / "a")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.extra.weight"] = torch.zeros(2)
    tensors["model.norm.weight"] = torch.zeros(7)
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert found(config, folder) == [
        "missing lm_head.weight",
        "unknown model.extra.weight",
        "model.norm.weight has shape [7], the network [32]",
    ]


def test_other_family_is_named_first(tmp_path: Path) -> None:
    moe = case_config(Case(name="a", family="qwen3_moe", overrides=()), 1)
    dense = case_config(Case(name="b", family="llama", overrides=FAMILIES["llama"]), 1)
    assert found(moe, saved(dense, tmp_path / "a"))[0] == "model.family is qwen3_moe, the checkpoint's llama"


@pytest.mark.parametrize("content", [b"{}", b"not json", b"[1]", b'{"trainer": "another"}'])
def test_file_of_another_trainer_beside_the_weights_says_nothing(content: bytes, tmp_path: Path) -> None:
    config = case_config(Case(name="a", family="qwen3_moe", overrides=()), 1)
    folder = saved(config, tmp_path / "a")
    (folder / "config.json").write_bytes(content)
    assert found(config, folder) == []


def test_network_that_the_model_section_cannot_say_is_refused(tmp_path: Path) -> None:
    config = case_config(Case(name="a", family="llama", overrides=FAMILIES["llama"]), 1)
    folder = saved(config, tmp_path / "a")
    values = json.loads((folder / "config.json").read_text())
    values["attention_bias"] = True
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="the model section cannot say attention_bias=True"):
        found(config, folder)


def test_weights_that_are_integers_do_not_fit(save_folder: Callable[..., str]) -> None:
    config = case_config(Case(name="a", family="qwen3_moe", overrides=()), 1)
    url = save_folder("integers", {"model.norm.weight": torch.zeros(32, dtype=torch.int32)})
    assert "model.norm.weight has dtype I32, which holds no weights" in misfits(config, open_checkpoint(url))
