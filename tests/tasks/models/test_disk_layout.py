"""Names and shapes on disk are what transformers writes, and what it wrote is loaded to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import AutoModelForCausalLM, PreTrainedModel

from cluster.storage import open_store
from configs.model import ModelConfig
from tasks.checkpoints.groups import group_names
from tasks.checkpoints.reader import open_checkpoint
from tasks.checkpoints.safetensors_header import CheckpointError, TensorEntry, read_header
from tasks.checkpoints.writer import write_shard
from tasks.models.build import build_model, build_model_config
from tasks.models.disk_layout import Piece, model_buffers, model_parameters, model_tensors, pieces_of
from tasks.models.slice_reads import plan_reads, run_reads
from tasks.models.weights import load_weights
from tests.tasks.models.families import FAMILIES, SEQUENCE_LENGTH, VARIANTS, build_trained_like, random_tokens

GATE_UP, DOWN = "model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"
MIXTRAL = "model.layers.1.block_sparse_moe.experts"


@pytest.fixture(scope="module", params=list(VARIANTS))
def model(request: pytest.FixtureRequest) -> ModelConfig:
    return VARIANTS[request.param]


@pytest.fixture(scope="module")
def network(model: ModelConfig) -> PreTrainedModel:
    return build_trained_like(model, seed=7)


@pytest.fixture(scope="module")
def folder(network: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What transformers writes for the network."""
    path = tmp_path_factory.mktemp("saved")
    network.save_pretrained(path)
    return path


def all_pieces(network: torch.nn.Module) -> dict[str, tuple[Piece, torch.Tensor]]:
    return {
        piece.disk_name: (piece, tensor)
        for name, tensor in model_tensors(network).items()
        for piece in pieces_of(name, tensor.shape)
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
    for name, parameter in model_parameters(network).items():
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


def test_pieces_of_mixtral_experts_are_called_as_its_authors_called_them() -> None:
    names = [piece.disk_name for piece in pieces_of(f"{MIXTRAL}.gate_up_proj", (2, 6, 3))]
    assert names == [f"{MIXTRAL}.{expert}.{part}.weight" for expert in range(2) for part in ("w1", "w3")]
    assert [piece.disk_name for piece in pieces_of(f"{MIXTRAL}.down_proj", (1, 3, 3))] == [f"{MIXTRAL}.0.w2.weight"]


@pytest.mark.parametrize("shape", [(), (5,), (5, 3), (2, 5, 3)])
def test_pieces_of_any_other_parameter_is_itself(shape: tuple[int, ...]) -> None:
    (piece,) = pieces_of("model.something.weight", shape)
    assert (piece.disk_name, piece.shape, piece.expert) == ("model.something.weight", shape, None)


def test_pieces_fall_into_the_parameter_groups_of_their_part(network: PreTrainedModel, model: ModelConfig) -> None:
    groups = group_names(all_pieces(network))
    mixture = {"router": 1, "experts": 3 * model.num_experts} if model.is_moe else {}
    if model.family == "deepseek_v3":
        mixture |= {"router": 2, "shared_expert": 3}
    for layer in range(model.num_layers):
        found = {name.rpartition(".")[2]: len(members) for name, members in groups.items() if f".{layer}." in name}
        dense = not model.is_moe or layer < model.num_dense_layers
        assert found.keys() == {"attention", "norms", *(("feed_forward",) if dense else mixture)}
        assert {part: found[part] for part in mixture if not dense} == ({} if dense else mixture)
    outer = {name for name in groups if not name.startswith("layers.")}
    assert outer == {"embedding", "norm"} | (set() if model.tie_embeddings else {"head"})


# Names and buffers


def test_model_tensors_are_the_state_dict_without_its_second_name_of_tied_tensors(
    model: ModelConfig, network: PreTrainedModel
) -> None:
    expected = [tensor.data_ptr() for tensor in network.state_dict(keep_vars=True).values()]
    found = [tensor.data_ptr() for tensor in model_tensors(network).values()]
    assert len(found) == len(set(found)) == len(expected) - model.tie_embeddings
    assert set(found) == set(expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_model_buffers_are_the_correction_biases_and_nothing_computed(family: str) -> None:
    buffers = model_buffers(build_model(FAMILIES[family], SEQUENCE_LENGTH))
    layers = (1, 2) if family == "deepseek_v3" else ()
    assert list(buffers) == [f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in layers]
    assert {(tensor.dtype, tuple(tensor.shape)) for tensor in buffers.values()} <= {(torch.float32, (6,))}


def test_model_buffers_written_to_change_the_network() -> None:
    network = build_model(FAMILIES["deepseek_v3"], SEQUENCE_LENGTH, seed=1)
    tokens = random_tokens(FAMILIES["deepseek_v3"])
    before = network(input_ids=tokens).logits
    for bias in model_buffers(network).values():
        bias.copy_(torch.tensor([9.0, 0.0, 0.0, 0.0, 0.0, 9.0]))
    assert not torch.equal(network(input_ids=tokens).logits, before)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("wrap", ["checkpointed", "compiled"])
def test_model_tensors_of_wrapped_layers_keep_their_names(family: str, wrap: str) -> None:
    network = build_model(FAMILIES[family], SEQUENCE_LENGTH)
    names = list(model_tensors(network))
    layers = network.model.layers
    for number in range(len(layers)):
        layers[number] = (
            checkpoint_wrapper(layers[number])
            if wrap == "checkpointed"
            else torch.compile(layers[number], backend="eager")
        )
    assert "_checkpoint_wrapped_module" in str(network) or "OptimizedModule" in str(network)
    assert list(model_tensors(network)) == names


# Loading


def test_load_weights_is_bit_equal_to_from_pretrained(model: ModelConfig, folder: Path) -> None:
    ours = build_model(model, SEQUENCE_LENGTH, seed=99)
    load_weights(ours, open_checkpoint(str(folder)))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = theirs.state_dict()
    assert set(ours.state_dict()) == set(expected)
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_load_weights_then_logits_equal_the_networks(
    model: ModelConfig, network: PreTrainedModel, folder: Path
) -> None:
    ours = build_model(model, SEQUENCE_LENGTH, seed=99)
    load_weights(ours, open_checkpoint(str(folder)))
    tokens = random_tokens(model)
    assert torch.equal(ours(input_ids=tokens).logits, network(input_ids=tokens).logits)


def test_own_pieces_written_load_in_transformers_with_no_key_missing_or_left_over(
    model: ModelConfig, network: PreTrainedModel, tmp_path: Path
) -> None:
    pieces = {name: piece.of(tensor.detach()).clone() for name, (piece, tensor) in all_pieces(network).items()}
    specs = [(name, "F32", tuple(tensor.shape)) for name, tensor in sorted(pieces.items())]

    def chunks_of(entry: TensorEntry) -> list[memoryview]:
        return [memoryview(pieces[entry.name].numpy().tobytes())]

    write_shard(open_store(str(tmp_path)), "model.safetensors", specs, chunks_of, "model")
    config = build_model_config(model, SEQUENCE_LENGTH)
    (tmp_path / "config.json").write_text(config.to_json_string(use_diff=False))
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert {name: list(found) for name, found in report.items() if found} == {}
    tokens = random_tokens(model)
    assert torch.equal(theirs(input_ids=tokens).logits, network(input_ids=tokens).logits)


def test_load_weights_lower_precision_is_widened(
    network: PreTrainedModel, model: ModelConfig, folder: Path, tmp_path: Path
) -> None:
    half = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(half, tmp_path / "model.safetensors")
    ours = build_model(model, SEQUENCE_LENGTH, seed=99)
    load_weights(ours, open_checkpoint(str(tmp_path)))
    originals = model_tensors(network)
    for name, tensor in model_tensors(ours).items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, originals[name].bfloat16().float()), name


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_load_weights_other_network_refused_with_the_tensor(
    model: ModelConfig, folder: Path, tmp_path: Path, change: str
) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.o_proj.weight"
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


def test_load_weights_checkpoint_without_the_correction_bias_refused(tmp_path: Path) -> None:
    # A trainer that forgets the buffer would restart routing from zero without a word.
    network = build_trained_like(FAMILIES["deepseek_v3"], seed=1)
    network.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.2.mlp.gate.e_score_correction_bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing model\.layers\.2\.mlp\.gate\.e_score_correction_bias"):
        load_weights(network, open_checkpoint(str(tmp_path)))


def test_load_weights_integer_tensor_refused(save_folder: Callable[..., str]) -> None:
    network = torch.nn.Linear(2, 2, bias=False)
    with pytest.raises(CheckpointError):
        load_weights(network, open_checkpoint(save_folder("integers", {"weight": torch.ones(2, 2, dtype=torch.int64)})))


@pytest.mark.parametrize("name", [GATE_UP, DOWN, "model.embed_tokens.weight", "model.norm.weight"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
def test_reads_of_ranks_together_are_the_whole_parameter(
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
        run_reads(checkpoint.store, plan_reads(checkpoint.model, name, whole.shape, row_start, target))
        assert torch.equal(target, whole[row_start : row_start + rows])


def cut(rows: int, world_size: int) -> list[tuple[int, int]]:
    share = -(-rows // world_size)
    starts = [min(rank * share, rows) for rank in range(world_size)]
    return [(start, min(share, rows - start)) for start in starts]
