"""Build a network from its configuration, with `transformers` model classes and random weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from configs.model import ModelConfig


def build_model_config(model: ModelConfig, sequence_length: int) -> PreTrainedConfig:
    """`transformers` configuration of ``model``; also what ``config.json`` of a snapshot holds."""
    shape = _common_shape(model, sequence_length) | _family_shape(model)
    config = AutoConfig.for_model(model.family, **shape)
    config.architectures = [_architecture(config)]
    config.dtype = "float32"
    return config


def build_model(model: ModelConfig, sequence_length: int, *, seed: int | None = None) -> PreTrainedModel:
    """The network in float32. ``seed`` draws initial weights; None leaves them to be overwritten."""
    config = build_model_config(model, sequence_length)
    options = {"experts_implementation": model.experts_implementation} if model.is_moe else {}
    if seed is not None:
        torch.manual_seed(seed)
    network = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32, **options)
    assert isinstance(network, PreTrainedModel)
    return network


def count_parameters(model: ModelConfig, sequence_length: int) -> int:
    """Number of parameters of the network, tied ones once, buffers not; nothing is allocated."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_model(model, sequence_length).parameters())


def _common_shape(model: ModelConfig, sequence_length: int) -> dict[str, Any]:
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads,
        "head_dim": model.head_size,
        "intermediate_size": model.intermediate_size,
        "max_position_embeddings": sequence_length,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "rms_norm_eps": model.norm_epsilon,
        "initializer_range": model.initializer_range,
        "tie_word_embeddings": model.tie_embeddings,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "use_cache": False,
    }


def _family_shape(model: ModelConfig) -> dict[str, Any]:
    """What the family adds to the common shape, or calls by the same name and means otherwise."""
    if not model.is_moe:
        return {}
    shape: dict[str, Any] = {"num_experts_per_tok": model.num_experts_per_token}
    if model.family == "deepseek_v3":
        return shape | _deepseek_shape(model)
    # Training balances routers itself, per layer (tasks.training.router_balance), and needs no logits for it.
    shape |= {"output_router_logits": False, "router_aux_loss_coef": model.router_loss_coefficient}
    match model.family:
        case "qwen3_moe":
            shape |= {
                "num_experts": model.num_experts,
                "moe_intermediate_size": model.expert_intermediate_size,
                "norm_topk_prob": model.normalise_top_k,
                "mlp_only_layers": list(range(model.num_dense_layers)),
            }
        case "olmoe":
            shape |= {
                "num_experts": model.num_experts,
                "intermediate_size": model.expert_intermediate_size,
                "norm_topk_prob": model.normalise_top_k,
            }
        case "mixtral":
            shape |= {"num_local_experts": model.num_experts, "intermediate_size": model.expert_intermediate_size}
    return shape


def _deepseek_shape(model: ModelConfig) -> dict[str, Any]:
    return {
        "head_dim": model.rope_head_size,  # what `transformers` makes of it, and what its rotary embedding reads
        "q_lora_rank": model.query_rank or None,
        "kv_lora_rank": model.key_value_rank,
        "qk_nope_head_dim": model.head_size,
        "qk_rope_head_dim": model.rope_head_size,
        "v_head_dim": model.value_head_size,
        "first_k_dense_replace": model.num_dense_layers,
        "n_routed_experts": model.num_experts,
        "n_shared_experts": model.num_shared_experts,
        "moe_intermediate_size": model.expert_intermediate_size,
        "n_group": model.num_expert_groups,
        "topk_group": model.num_groups_per_token,
        "routed_scaling_factor": model.routed_scaling_factor,
        "norm_topk_prob": model.normalise_top_k,
        "num_nextn_predict_layers": 0,  # no multi-token prediction modules: a checkpoint holds none
    }


def _architecture(config: PreTrainedConfig) -> str:
    return str(AutoModelForCausalLM._model_mapping[type(config)].__name__)
