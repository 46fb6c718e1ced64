"""Names and shapes on disk are what transformers writes, and what it wrote is loaded to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from cluster.storage import open_store
from configs.model import ModelConfig
from tasks.checkpoints.reader import open_checkpoint
from tasks.checkpoints.safetensors_header import CheckpointError, read_header
from tasks.models.build import build_model, build_model_config
from tasks.models.disk_layout import Piece, pieces_of
from tasks.models.weights import load_weights, read_slice

SEQUENCE_LENGTH = 16
SHAPE: dict[str, Any] = {
    "hidden_size": 32, "num_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_size": 8,
    "intermediate_size": 48, "initializer_range": 0.02,
}  # fmt: skip
MODELS = {
    "qwen3_moe": ModelConfig(
        family="qwen3_moe", num_experts=4, num_experts_per_token=2, expert_intermediate_size=24, **SHAPE
    ),
    "llama": ModelConfig(family="llama", num_experts=0, **SHAPE),
    "qwen3 tied": ModelConfig(family="qwen3", num_experts=0, tie_embeddings=True, **SHAPE),
}
GATE_UP, DOWN = "model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"


@pytest.fixture(scope="module", params=list(MODELS))
def model(request: pytest.FixtureRequest) -> ModelConfig:
    return MODELS[request.param]


@pytest.fixture(scope="module")
def network(model: ModelConfig) -> PreTrainedModel:
    return build_model(model, SEQUENCE_LENGTH, seed=7)


@pytest.fixture(scope="module")
def folder(network: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What transformers writes for the network."""
    path = tmp_path_factory.mktemp("saved")
    network.save_pretrained(path)
    return path


def all_pieces(network: torch.nn.Module) -> dict[str, tuple[Piece, torch.Tensor]]:
    return {
        piece.disk_name: (piece, parameter)
        for name, parameter in network.named_parameters()
        for piece in pieces_of(name, parameter.shape)
    }


# The disk layout against transformers


def test_pieces_names_and_shapes_are_what_transformers_writes(network: PreTrainedModel, folder: Path) -> None:
    written = {item.name: item.shape for item in read_header(open_store(str(folder)), "model.safetensors")}
    assert {name: piece.shape for name, (piece, _) in all_pieces(network).items()} == written


def test_pieces_values_are_what_transformers_writes(network: PreTrainedModel, folder: Path) -> None:
    written = load_file(folder / "model.safetensors")
    for name, (piece, parameter) in all_pieces(network).items():
        assert torch.equal(piece.of(parameter.detach()), written[name]), name


def test_pieces_tile_each_parameter_exactly(network: PreTrainedModel) -> None:
    for name, parameter in network.named_parameters():
        seen = torch.zeros_like(parameter, dtype=torch.int32)
        for piece in pieces_of(name, parameter.shape):
            piece.of(seen).add_(1)
        assert (seen == 1).all(), name


def test_pieces_of_fused_experts_are_one_tensor_an_expert() -> None:
    names = [piece.disk_name for piece in pieces_of(GATE_UP, (2, 6, 3))]
    assert names == [
        f"model.layers.1.mlp.experts.{expert}.{part}_proj.weight" for expert in range(2) for part in ("gate", "up")
    ]
    assert [piece.shape for piece in pieces_of(DOWN, (2, 3, 6))] == [(3, 6), (3, 6)]


@pytest.mark.parametrize("shape", [(), (5,), (5, 3), (2, 5, 3)])
def test_pieces_of_any_other_parameter_is_itself(shape: tuple[int, ...]) -> None:
    (piece,) = pieces_of("model.something.weight", shape)
    assert (piece.disk_name, piece.shape, piece.expert) == ("model.something.weight", shape, None)


def test_build_model_config_round_trips_through_its_file(model: ModelConfig, folder: Path) -> None:
    config = build_model_config(model, SEQUENCE_LENGTH)
    loaded = AutoConfig.from_pretrained(folder)
    for key in ("hidden_size", "num_hidden_layers", "head_dim", "intermediate_size", "vocab_size", "architectures"):
        assert getattr(loaded, key) == getattr(config, key), key
    assert loaded.tie_word_embeddings is model.tie_embeddings


def test_build_model_same_seed_is_the_same_network(model: ModelConfig, network: PreTrainedModel) -> None:
    again, other = build_model(model, SEQUENCE_LENGTH, seed=7), build_model(model, SEQUENCE_LENGTH, seed=8)
    same = [torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True)]
    assert all(same)
    assert not all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True))
    assert {parameter.dtype for parameter in again.parameters()} == {torch.float32}


# Loading


def test_load_weights_is_bit_equal_to_from_pretrained(model: ModelConfig, folder: Path) -> None:
    ours = build_model(model, SEQUENCE_LENGTH, seed=99)
    load_weights(ours, open_checkpoint(str(folder)))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = dict(theirs.named_parameters())
    assert set(dict(ours.named_parameters())) == set(expected)
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_load_weights_lower_precision_is_widened(
    network: PreTrainedModel, model: ModelConfig, folder: Path, tmp_path: Path
) -> None:
    half = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(half, tmp_path / "model.safetensors")
    ours = build_model(model, SEQUENCE_LENGTH, seed=99)
    load_weights(ours, open_checkpoint(str(tmp_path)))
    for (name, parameter), original in zip(ours.named_parameters(), network.parameters(), strict=True):
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, original.bfloat16().float()), name


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_load_weights_other_network_refused_with_the_tensor(
    model: ModelConfig, folder: Path, tmp_path: Path, change: str
) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.weight"
    if change == "missing":
        del tensors[name]
    elif change == "unknown":
        name = "model.layers.1.self_attn.extra.weight"
        tensors[name] = torch.zeros(1)
    else:
        tensors[name] = tensors[name][:4].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    ours = build_model(model, SEQUENCE_LENGTH, seed=99)
    before = [parameter.clone() for parameter in ours.parameters()]
    with pytest.raises(CheckpointError, match=name):
        load_weights(ours, open_checkpoint(str(tmp_path)))
    assert all(torch.equal(a, b) for a, b in zip(before, ours.parameters(), strict=True))


def test_load_weights_integer_tensor_refused(save_folder: Callable[..., str]) -> None:
    network = torch.nn.Linear(2, 2, bias=False)
    with pytest.raises(CheckpointError):
        load_weights(network, open_checkpoint(save_folder("integers", {"weight": torch.ones(2, 2, dtype=torch.int64)})))


@pytest.mark.parametrize("name", [GATE_UP, DOWN, "model.embed_tokens.weight", "model.norm.weight"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
def test_read_slice_ranks_together_are_the_whole_parameter(
    tmp_path_factory: pytest.TempPathFactory, name: str, world_size: int
) -> None:
    shapes = {GATE_UP: (4, 6, 5), DOWN: (4, 5, 3), "model.embed_tokens.weight": (7, 5), "model.norm.weight": (5,)}
    whole = torch.arange(float(torch.Size(shapes[name]).numel())).reshape(shapes[name])
    folder = tmp_path_factory.mktemp("slices")
    pieces = {piece.disk_name: piece.of(whole).contiguous().clone() for piece in pieces_of(name, whole.shape)}
    save_file(pieces, folder / "model.safetensors")
    checkpoint = open_checkpoint(str(folder))
    # As FSDP2 cuts dimension 0: equal slices, the last ones shorter or empty.
    for row_start, rows in cut(whole.shape[0], world_size):
        target = torch.full((rows, *whole.shape[1:]), -1.0)
        read_slice(checkpoint.store, checkpoint.model, name, whole.shape, row_start, target)
        assert torch.equal(target, whole[row_start : row_start + rows])


def cut(rows: int, world_size: int) -> list[tuple[int, int]]:
    share = -(-rows // world_size)
    starts = [min(rank * share, rows) for rank in range(world_size)]
    return [(start, min(share, rows - start)) for start in starts]
