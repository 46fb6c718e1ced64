"""What the MoE report says of drift, permuted and dead experts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tasks.checkpoints.reader import open_checkpoint
from tasks.merging.moe_report import describe_experts

EXPERTS = 6
LAYER = "model.layers.0.mlp"


def experts(seed: int, *, fused: bool, noise: float = 0.01) -> dict[str, torch.Tensor]:
    """One run's experts: the same base, moved a little by ``seed``."""
    base = torch.randn(EXPERTS, 12, 8, generator=torch.Generator().manual_seed(0))
    moved = base + noise * torch.randn(base.shape, generator=torch.Generator().manual_seed(seed))
    gate = torch.randn(EXPERTS, 8, generator=torch.Generator().manual_seed(100 + seed))
    made = (
        {f"{LAYER}.experts.gate_up_proj": moved}
        if fused
        else {f"{LAYER}.experts.{e}.up_proj.weight": moved[e].clone() for e in range(EXPERTS)}
    )
    return {**made, f"{LAYER}.gate.weight": gate}


@pytest.fixture(params=[False, True], ids=["one tensor an expert", "fused"])
def fused(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def swap(made: dict[str, torch.Tensor], a: int, b: int) -> None:
    if f"{LAYER}.experts.gate_up_proj" in made:
        tensor = made[f"{LAYER}.experts.gate_up_proj"]
        tensor[[a, b]] = tensor[[b, a]].clone()
    else:
        first, second = (f"{LAYER}.experts.{e}.up_proj.weight" for e in (a, b))
        made[first], made[second] = made[second], made[first]


def test_report_of_one_run_has_small_drift_and_no_warning(save_folder: Callable[..., str], fused: bool) -> None:
    urls = [save_folder(f"in{seed}", experts(seed, fused=fused)) for seed in (1, 2, 3)]
    report = describe_experts([open_checkpoint(url) for url in urls])
    (layer,) = report["layers"]
    assert layer["experts"] == EXPERTS
    assert all(0.005 < drift < 0.05 for drift in layer["drift_mean"])
    assert report["warnings"] == []
    assert len(report["routers"][0]["shift"]) == 2


def test_report_names_permuted_experts(save_folder: Callable[..., str], fused: bool) -> None:
    made = [experts(seed, fused=fused) for seed in (1, 2)]
    swap(made[1], 1, 4)
    urls = [save_folder(f"in{number}", tensors) for number, tensors in enumerate(made)]
    warnings = describe_experts([open_checkpoint(url) for url in urls])["warnings"]
    assert len(warnings) == 2
    assert "expert 1 looks like expert 4" in warnings[0]
    assert "expert 4 looks like expert 1" in warnings[1]


def test_report_names_an_expert_that_did_not_move_and_one_that_is_zero(save_folder: Callable[..., str]) -> None:
    made = [experts(seed, fused=False) for seed in (1, 2)]
    made[1][f"{LAYER}.experts.3.up_proj.weight"] = made[0][f"{LAYER}.experts.3.up_proj.weight"].clone()
    for tensors in made:
        tensors[f"{LAYER}.experts.5.up_proj.weight"].zero_()
    urls = [save_folder(f"in{number}", tensors) for number, tensors in enumerate(made)]
    warnings = "\n".join(describe_experts([open_checkpoint(url) for url in urls])["warnings"])
    assert "expert 3 did not move, others did" in warnings
    assert "input 1: expert 5 is all zero" in warnings


def test_report_of_a_dense_model_is_empty(save_folder: Callable[..., str]) -> None:
    url = save_folder("dense", {"model.layers.0.mlp.up_proj.weight": torch.randn(3, 3)})
    assert describe_experts([open_checkpoint(url)])["layers"] == []
