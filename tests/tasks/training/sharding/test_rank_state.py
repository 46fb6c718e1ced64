"""A rank's share as its own memory, and restoring from plain folders: values, dtypes, refusals, failing reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from cluster.errors import StorageError
from tasks.checkpoints.reader import Checkpoint, open_checkpoint
from tasks.checkpoints.safetensors_header import CheckpointError
from tasks.models import slice_reads
from tasks.models.build import build_model
from tasks.models.disk_layout import model_buffers, model_parameters, pieces_of
from tasks.models.slice_reads import plan_reads, run_reads
from tasks.training.sharding.rank_state import gather_share, restore_rank
from tasks.training.sharding.sharded_model import ShardedModel, build_sharded_model
from tests.faulty_store import FaultyStore
from tests.sharded_gang import Case, batch_of, case_config, loss_of

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture
def model() -> ShardedModel:
    return build_sharded_model(case_config(Case(name="", family="deepseek_v3"), 1), 0, 1)


def other_network() -> PreTrainedModel:
    """Other weights and biases than the fixture's model."""
    config = case_config(Case(name="", family="deepseek_v3"), 1)
    network = build_model(config.model, config.training.sequence_length, seed=99)
    for bias in model_buffers(network).values():
        bias.copy_(torch.arange(len(bias)) / 7)
    return network


@pytest.fixture
def folder(tmp_path: Path) -> Checkpoint:
    """What transformers itself writes of :func:`other_network`."""
    other_network().save_pretrained(tmp_path / "hf")
    return open_checkpoint(str(tmp_path / "hf"))


def train_once(model: ShardedModel) -> None:
    for part in model.micro_batches(batch_of(0), 1):
        loss_of(model.network, part).backward()
    model.step(1e-2)


def test_share_is_memory_that_training_does_not_touch(model: ShardedModel) -> None:
    train_once(model)
    share = gather_share(model, 0, 1)
    kept = {name: tensor.clone() for name, tensor in {**share.model, **share.state}.items()}
    for bias in model_buffers(model.network).values():
        bias.add_(1.0)
    train_once(model)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in {**share.model, **share.state}.items())
    later = gather_share(model, 0, 1)
    assert later.model.keys() == share.model.keys()
    changed = {name for name, tensor in later.model.items() if not torch.equal(tensor, kept[name])}
    assert "lm_head.weight" in changed
    assert any(name.endswith("e_score_correction_bias") for name in changed)
    assert {(share.number, share.of), (later.number, later.of)} == {(1, 1)}


def test_moments_before_the_first_step_are_zeros_of_every_parameter(model: ShardedModel) -> None:
    share = gather_share(model, 0, 1)
    named = model_parameters(model.network).items()
    names = [piece.disk_name for name, parameter in named for piece in pieces_of(name, parameter.shape)]
    assert share.state.keys() == {f"{m}.{name}" for m in ("exp_avg", "exp_avg_sq") for name in names}
    assert not any(tensor.any() for tensor in share.state.values())


def test_restored_from_a_plain_folder_holds_its_weights_and_biases(model: ShardedModel, folder: Checkpoint) -> None:
    restore_rank(model, folder, with_moments=False, optimizer_steps=0)
    expected = other_network()
    for item, parameter in zip(model.slices, expected.parameters(), strict=True):
        assert torch.equal(item.local, parameter)
    for held, buffer in zip(model_buffers(model.network).values(), model_buffers(expected).values(), strict=True):
        assert torch.equal(held, buffer)
    assert any(buffer.any() for buffer in model_buffers(expected).values())
    with torch.no_grad():
        assert loss_of(model.network, batch_of(0)) == loss_of(expected, batch_of(0))


def test_restored_from_bfloat16_holds_the_same_numbers_as_float32(model: ShardedModel, tmp_path: Path) -> None:
    other_network().bfloat16().save_pretrained(tmp_path / "bf16")
    restore_rank(model, open_checkpoint(str(tmp_path / "bf16")), with_moments=False, optimizer_steps=0)
    for item, parameter in zip(model.slices, other_network().parameters(), strict=True):
        assert item.local.dtype == torch.float32
        assert torch.equal(item.local, parameter.bfloat16().float())


def test_folder_without_moments_is_refused_where_they_are_asked_for(model: ShardedModel, folder: Checkpoint) -> None:
    before = [item.local.detach().clone() for item in model.slices]
    with pytest.raises(CheckpointError, match="no training state to resume from"):
        restore_rank(model, folder, with_moments=True, optimizer_steps=3)
    assert all(torch.equal(item.local, value) for item, value in zip(model.slices, before, strict=True))


def test_folder_that_lacks_a_tensor_is_refused_by_its_name(model: ShardedModel, folder: Checkpoint) -> None:
    places = {name: place for name, place in folder.model.items() if "experts.3.up_proj" not in name}
    with pytest.raises(CheckpointError, match=r"missing model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight"):
        restore_rank(model, replace(folder, model=places), with_moments=False, optimizer_steps=0)


def test_failing_read_ends_the_restore(model: ShardedModel, folder: Checkpoint) -> None:
    store = FaultyStore(folder.store, lambda method, _key: method == "read_into")
    with pytest.raises(StorageError, match="on purpose"):
        restore_rank(model, replace(folder, store=store), with_moments=False, optimizer_steps=0)


@pytest.mark.parametrize(("name", "first", "end"), [
    ("lm_head.weight", 100, 173), ("model.layers.1.mlp.experts.gate_up_proj", 1, 3), ("model.norm.weight", 5, 9),
    ("lm_head.weight", 256, 256),
])  # fmt: skip
def test_rows_of_a_rank_are_read_and_no_others(
    folder: Checkpoint, monkeypatch: pytest.MonkeyPatch, name: str, first: int, end: int
) -> None:
    monkeypatch.setattr(slice_reads, "READ_BYTES", 4096)
    parameter = model_parameters(other_network())[name].detach()
    target = torch.full_like(parameter[first:end], torch.nan)
    reads = list(plan_reads(folder.model, name, parameter.shape, first, target))
    assert sum(read.target.numel() for read in reads) == target.numel()
    assert all(read.target.nbytes <= 4096 for read in reads)
    run_reads(folder.store, reads)
    assert torch.equal(target, parameter[first:end])


def test_share_of_one_rank_is_what_transformers_writes(model: ShardedModel, tmp_path: Path) -> None:
    config = case_config(Case(name="", family="deepseek_v3"), 1)
    whole = build_model(config.model, config.training.sequence_length, seed=config.seed)
    whole.save_pretrained(tmp_path / "whole")
    expected = load_file(tmp_path / "whole" / "model.safetensors")
    share = gather_share(model, 0, 1)
    assert share.model.keys() == expected.keys()
    assert all(torch.equal(share.model[name], value) for name, value in expected.items())
