"""What one rank shows of the sharded model: recomputation, micro batches, clipping, devices."""

from __future__ import annotations

import math

import pytest
import torch

from configs.errors import ConfigError, UserError
from tasks.training.sharding.sharded_model import ShardedModel, build_sharded_model
from tests.sharded_gang import Case, batch_of, case_config, loss_of

pytestmark = pytest.mark.usefixtures("one_rank")


def build(*overrides: str) -> ShardedModel:
    return build_sharded_model(case_config(Case(name="", family="qwen3_moe", overrides=overrides), 1), 0, 1)


@pytest.mark.parametrize(("mode", "passes"), [("none", 1), ("layer", 2)])
def test_activation_checkpointing_computes_each_layer_twice(mode: str, passes: int) -> None:
    model = build(f"training.activation_checkpointing={mode}", "training.fsdp_unit=layer")
    # Recomputation stops at the last tensor that is needed, which is inside the feed-forward part.
    calls: list[int] = []
    for number, layer in enumerate(model.network.model.layers):
        layer.self_attn.register_forward_hook(lambda *_, number=number: calls.append(number))
    loss_of(model.network, batch_of(0)).backward()
    assert sorted(calls) == sorted([0, 1] * passes)


def test_model_that_does_not_fit_is_refused_before_it_is_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.training.memory.host_bytes", lambda: 1 << 10)
    monkeypatch.setattr("tasks.training.sharding.sharded_model.materialise", None)
    with pytest.raises(UserError, match=r"a rank needs at least .* over 1 ranks of a replica"):
        build()


def test_micro_batches_are_the_rows_in_order_and_reduce_with_the_last() -> None:
    model = build("training.micro_batches=4")
    rows = batch_of(0)
    parts = []
    for part in model.micro_batches(rows, 4):
        parts.append(part)
        (loss_of(model.network, part) / 4).backward()
        assert (model.slices[0].parameter.grad is not None) == (len(parts) == 4)
    assert torch.equal(torch.cat(parts), rows)
    assert {len(part) for part in parts} == {2}


def test_gradients_reduced_with_each_micro_batch_are_there_after_the_first() -> None:
    model = build("training.micro_batches=4", "training.reduce_each_micro_batch=true")
    for part in model.micro_batches(batch_of(0), 4):
        loss_of(model.network, part).backward()
        assert all(item.parameter.grad is not None for item in model.slices)


def test_clipping_scales_to_the_limit_and_leaves_smaller_gradients_alone() -> None:
    model = build()
    loss_of(model.network, batch_of(0)).backward()
    norm = model.gradient_norm()
    model.clip_gradients(float(norm) * 2, norm)
    assert torch.equal(model.gradient_norm(), norm)
    model.clip_gradients(float(norm) / 4, norm)
    assert float(model.gradient_norm()) == pytest.approx(float(norm) / 4, rel=1e-5)
    model.slices[0].parameter.grad.to_local()[0, 0] = math.inf  # type: ignore[union-attr]
    assert float(model.gradient_norm()) == math.inf
    model.drop_gradients()
    assert float(model.gradient_norm()) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what the test says is missing")
def test_cuda_without_a_device_is_refused_by_its_key() -> None:
    with pytest.raises(ConfigError, match=r"^training\.device='cuda'"):
        build("training.device=cuda")
