"""A small network of every family, with every part that the family can have; no two widths of one are equal by chance."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from configs.model import ModelConfig
from tasks.models.build import build_model
from tasks.models.disk_layout import model_tensors

SEQUENCE_LENGTH = 16
SHAPE: dict[str, Any] = {
    "hidden_size": 32, "num_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_size": 10,
    "intermediate_size": 48, "initializer_range": 0.02,
}  # fmt: skip
MOE: dict[str, Any] = {**SHAPE, "num_experts": 6, "num_experts_per_token": 2, "expert_intermediate_size": 24}
DEEPSEEK: dict[str, Any] = {
    **MOE, "num_key_value_heads": 4, "key_value_rank": 14, "query_rank": 22, "rope_head_size": 6, "value_head_size": 12,
    "num_shared_experts": 2, "num_dense_layers": 1, "num_expert_groups": 3, "num_groups_per_token": 2,
    "routed_scaling_factor": 2.5,
}  # fmt: skip
FAMILIES = {
    "qwen3_moe": ModelConfig(family="qwen3_moe", **MOE),
    "olmoe": ModelConfig(family="olmoe", **{**MOE, "head_size": 8}),
    "mixtral": ModelConfig(family="mixtral", **MOE),
    "deepseek_v3": ModelConfig(family="deepseek_v3", **DEEPSEEK),
    "llama": ModelConfig(family="llama", num_experts=0, **SHAPE),
    "qwen3": ModelConfig(family="qwen3", num_experts=0, **SHAPE),
}
VARIANTS = {
    **FAMILIES,
    "qwen3_moe, first layer dense": ModelConfig(family="qwen3_moe", num_dense_layers=1, **MOE),
    "deepseek_v3, queries whole": ModelConfig(family="deepseek_v3", **{**DEEPSEEK, "query_rank": 0}),
    "qwen3 tied": ModelConfig(family="qwen3", num_experts=0, tie_embeddings=True, **SHAPE),
    "mixtral tied": ModelConfig(family="mixtral", tie_embeddings=True, **MOE),
    "deepseek_v3 tied": ModelConfig(family="deepseek_v3", tie_embeddings=True, **DEEPSEEK),
}
MIXTURES = {name: model for name, model in FAMILIES.items() if model.is_moe}


def build_trained_like(model: ModelConfig, seed: int) -> PreTrainedModel:
    """A network none of whose tensors is all zeros or all ones, as fresh biases and norms are: mixed-up ones show."""
    network = build_model(model, SEQUENCE_LENGTH, seed=seed)
    with torch.no_grad():
        for tensor in model_tensors(network).values():
            if tensor.ndim == 1:
                tensor.add_(torch.randn(tensor.shape), alpha=0.1)
    return network


def random_tokens(model: ModelConfig, *, sequences: int = 2, seed: int = 0) -> torch.Tensor:
    """Token ids ``[sequences, SEQUENCE_LENGTH]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.vocab_size, (sequences, SEQUENCE_LENGTH), generator=generator)
