"""Active parameters: by hand for an MoE, all of them for a dense network."""

from __future__ import annotations

from configs.load import load_config
from tasks.models.build import count_parameters
from tasks.models.size import active_parameters


def test_moe_leaves_out_the_experts_that_a_token_is_not_sent_to() -> None:
    model = load_config("tiny").config.model
    router, expert = model.hidden_size, 3 * model.hidden_size * (model.expert_intermediate_size or 0)
    idle = model.num_experts - model.num_experts_per_token
    whole = count_parameters(model, 128)
    assert active_parameters(model, 128) == whole - model.num_layers * idle * (expert + router)


def test_dense_is_all_active() -> None:
    model = load_config("dense-411m").config.model
    assert active_parameters(model, 4096) == count_parameters(model, 4096)
