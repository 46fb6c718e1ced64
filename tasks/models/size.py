"""How many parameters a token goes through."""

from __future__ import annotations

from dataclasses import replace

from configs.model import ModelConfig
from tasks.models.build import count_parameters


def active_parameters(model: ModelConfig, sequence_length: int) -> int:
    """Parameters that one token goes through: all but those of the experts that it is not sent to."""
    whole = count_parameters(model, sequence_length)
    if not model.is_moe:
        return whole
    # The same network with one expert less an MoE layer says what an expert costs.
    one = whole - count_parameters(replace(model, num_experts=model.num_experts - 1), sequence_length)
    return whole - one * (model.num_experts - model.num_experts_per_token)
