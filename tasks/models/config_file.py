"""The `model` section for a Hugging Face ``config.json``: bring a model by its file instead of writing its shape down.

transformers reads the file. What comes out is proven: the section is turned into a `transformers` configuration again,
and wherever that differs from the file in something that the network depends on, the file is refused.
"""

from __future__ import annotations

import json
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from cluster.errors import ObjectMissing
from cluster.storage import open_store
from configs.errors import UserError
from configs.model import DENSE_FAMILIES, MOE_FAMILIES, ModelConfig
from tasks.models.build import build_model_config

CONFIG_KEY = "config.json"
DEEPSEEK_LOSS_COEFFICIENT = 1e-4
"""DeepSeek-V3's weight of the load-balance loss (arXiv 2412.19437, section 4.2); its file does not hold it."""
# What the network of a training run does not depend on: where the file comes from, token ids, generation, the length
# that positions were trained to, and keys of the authors' own code whose one value is built into transformers' classes.
_INERT = frozenset({
    "_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache",
    "bos_token_id", "eos_token_id", "pad_token_id", "pretraining_tp", "max_position_embeddings", "num_nextn_predict_layers",
    "output_router_logits", "router_aux_loss_coef", "head_dim", "aux_loss_alpha", "seq_aux", "ep_size", "max_window_layers",
})  # fmt: skip
_BUILT_IN = {"moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc"}


def read_model_shape(url: str) -> ModelConfig:
    """Shape of the network that the Hugging Face folder, or ``config.json``, at ``url`` describes.

    Raises :class:`configs.errors.UserError` if there is none, if its family is not one of ours, or, naming the keys, if
    it has something that the `model` section cannot say, such as scaled rotary positions.
    """
    folder, _, key = url.rpartition("/") if url.endswith(".json") else (url, "", CONFIG_KEY)
    try:
        values = json.loads(open_store(folder or ".").read(key))
    except ObjectMissing:
        raise UserError(f"{url}: no {key} there; give a Hugging Face model folder or the file itself") from None
    except ValueError as error:
        raise UserError(f"{url}: not JSON: {error}") from None
    families = (*MOE_FAMILIES, *DENSE_FAMILIES)
    family = values.pop("model_type", None) if isinstance(values, dict) else None
    if family not in families:
        raise UserError(f"{url}: model_type is {family!r}; known families: {', '.join(families)}")
    try:
        given = AutoConfig.for_model(family, **values)
    except (StrictDataclassError, TypeError, ValueError, KeyError) as error:
        raise UserError(f"{url}: transformers does not accept it: {error}") from None
    model = ModelConfig(family=family, **(_common_keys(given) | _family_keys(family, given)))
    if problems := _differences(given, build_model_config(model, given.max_position_embeddings)):
        raise UserError(f"{url}: the model section cannot say {'; '.join(problems)}")
    return model


def _common_keys(given: PreTrainedConfig) -> dict[str, Any]:
    heads = given.num_attention_heads
    return {
        "vocab_size": given.vocab_size,
        "hidden_size": given.hidden_size,
        "num_layers": given.num_hidden_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": given.num_key_value_heads,
        "head_size": getattr(given, "head_dim", None) or given.hidden_size // heads,
        "tie_embeddings": given.tie_word_embeddings,
        "rope_theta": float(given.rope_parameters["rope_theta"]),
        "norm_epsilon": given.rms_norm_eps,
        "initializer_range": given.initializer_range,
    }


def _family_keys(family: str, given: PreTrainedConfig) -> dict[str, Any]:
    if family in DENSE_FAMILIES:
        return {"num_experts": 0, "intermediate_size": given.intermediate_size}
    keys: dict[str, Any] = {"num_experts": given.num_local_experts, "num_experts_per_token": given.num_experts_per_tok}
    if family == "deepseek_v3":
        return keys | _deepseek_keys(given)
    keys["router_loss_coefficient"] = given.router_aux_loss_coef
    if family == "qwen3_moe":
        keys |= {
            "intermediate_size": given.intermediate_size,
            "expert_intermediate_size": given.moe_intermediate_size,
            "num_dense_layers": len(given.mlp_only_layers),
        }
    else:
        keys["expert_intermediate_size"] = given.intermediate_size
    return keys if family == "mixtral" else {**keys, "normalise_top_k": given.norm_topk_prob}


def _deepseek_keys(given: PreTrainedConfig) -> dict[str, Any]:
    return {
        "head_size": given.qk_nope_head_dim,
        "query_rank": given.q_lora_rank or 0,
        "key_value_rank": given.kv_lora_rank,
        "rope_head_size": given.qk_rope_head_dim,
        "value_head_size": given.v_head_dim,
        "intermediate_size": given.intermediate_size,
        "num_dense_layers": given.first_k_dense_replace,
        "expert_intermediate_size": given.moe_intermediate_size,
        "num_shared_experts": given.n_shared_experts,
        "num_expert_groups": given.n_group,
        "num_groups_per_token": given.topk_group,
        "routed_scaling_factor": float(given.routed_scaling_factor),
        "normalise_top_k": given.norm_topk_prob,
        "router_loss_coefficient": DEEPSEEK_LOSS_COEFFICIENT,
    }


def _differences(given: PreTrainedConfig, ours: PreTrainedConfig) -> list[str]:
    before, after = _BUILT_IN | given.to_dict(), _BUILT_IN | ours.to_dict()
    keys = sorted((before.keys() | after.keys()) - _INERT)
    return [f"{key}={before.get(key)!r}" for key in keys if before.get(key) != after.get(key)]
