"""Who writes which tensor: all once, experts where they lie, bytes balanced, exchanges bounded."""

from __future__ import annotations

import pytest

from tasks.models.disk_layout import pieces_of
from tasks.training.sharding.mesh import MeshPlan
from tasks.training.sharding.ownership import Owned, Parameter, plan_ownership, plan_rounds

LAYERS, EXPERTS, WIDTH = 3, 8, 32
GRIDS = [(1, 1, 1), (1, 4, 1), (1, 4, 4), (1, 8, 2), (2, 2, 2), (3, 4, 2), (4, 1, 1)]


def model(expert_parallel: int) -> tuple[Parameter, ...]:
    shapes = {"model.embed_tokens.weight": (256, WIDTH), "lm_head.weight": (250, WIDTH), "model.norm.weight": (WIDTH,)}
    for layer in range(LAYERS):
        base = f"model.layers.{layer}"
        shapes[f"{base}.self_attn.q_proj.weight"] = (WIDTH, WIDTH)
        shapes[f"{base}.mlp.experts.gate_up_proj"] = (EXPERTS, 2 * WIDTH, WIDTH)
        shapes[f"{base}.mlp.experts.down_proj"] = (EXPERTS, WIDTH, WIDTH)
    return tuple(
        Parameter(name=name, shape=shape, is_expert=expert_parallel > 1 and len(shape) == 3)
        for name, shape in shapes.items()
    )


@pytest.mark.parametrize(("replicas", "shards", "expert_parallel"), GRIDS)
def test_every_tensor_has_one_owner_and_experts_stay_where_they_lie(
    replicas: int, shards: int, expert_parallel: int
) -> None:
    plan = MeshPlan(replicas=replicas, shards=shards, expert_parallel=expert_parallel)
    parameters = model(expert_parallel)
    owned = plan_ownership(parameters, plan)
    names = [piece.disk_name for p in parameters for piece in pieces_of(p.name, p.shape)]
    assert sorted(entry.piece.disk_name for entry in owned) == sorted(names)
    for entry in owned:
        parameter = parameters[entry.index]
        start, end = plan.rows(parameter.shape[0], plan.shard_of(entry.owner), is_expert=parameter.is_expert)
        if entry.piece.expert is not None:
            assert entry.is_whole
            assert start <= entry.piece.expert < end
        else:
            assert entry.is_whole == (shards == 1)
            assert not entry.is_whole or (start, end) == (0, parameter.shape[0])


@pytest.mark.parametrize(("replicas", "shards", "expert_parallel"), GRIDS)
def test_bytes_are_balanced_to_the_largest_tensor(replicas: int, shards: int, expert_parallel: int) -> None:
    plan = MeshPlan(replicas=replicas, shards=shards, expert_parallel=expert_parallel)
    owned = plan_ownership(model(expert_parallel), plan)
    loads = [sum(entry.num_elements for entry in owned if entry.owner == rank) for rank in range(plan.world_size)]
    assert max(loads) - min(loads) <= max(entry.num_elements for entry in owned)


def test_rounds_take_from_every_owner_up_to_the_limit_and_a_larger_tensor_alone() -> None:
    items = [(0, 60, "a"), (0, 60, "b"), (1, 30, "c"), (1, 30, "d"), (1, 30, "e"), (0, 500, "f"), (0, 10, "g")]
    assert list(plan_rounds(items, 100)) == [["a", "c", "d", "e"], ["b"], ["f"], ["g"]]
    assert list(plan_rounds([], 100)) == []


def test_plan_of_a_large_model_is_made_once() -> None:
    plan = MeshPlan(replicas=1, shards=4, expert_parallel=2)
    first: tuple[Owned, ...] = plan_ownership(model(2), plan)
    assert plan_ownership(model(2), plan) is first
