"""Networks of every family: the configuration transformers gets, released models' sizes, initial weights, the forward pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, DeepseekV3Config, MixtralConfig, OlmoeConfig

from configs.errors import ConfigError
from configs.model import ModelConfig
from tasks.models.build import build_model, build_model_config, count_parameters
from tasks.models.disk_layout import model_buffers, model_tensors
from tests.tasks.models.families import DEEPSEEK, FAMILIES, MOE, SEQUENCE_LENGTH, SHAPE, VARIANTS, random_tokens

IMPLEMENTATION_TOLERANCE = 1e-5
"""Logits are about 0.1 and sums of 32 products in float32: reordering them moves a logit by 32 * 2**-24 * 0.1 at worst a layer."""
RELEASED = {
    "mixtral": ModelConfig(  # mistralai/Mixtral-8x7B-v0.1
        family="mixtral", vocab_size=32000, hidden_size=4096, num_layers=32, num_attention_heads=32,
        num_key_value_heads=8, head_size=128, num_experts=8, num_experts_per_token=2, expert_intermediate_size=14336,
        norm_epsilon=1e-5, rope_theta=1e6,
    ),
    "olmoe": ModelConfig(  # allenai/OLMoE-1B-7B-0924
        family="olmoe", vocab_size=50304, hidden_size=2048, num_layers=16, num_attention_heads=16,
        num_key_value_heads=16, head_size=128, num_experts=64, num_experts_per_token=8, expert_intermediate_size=1024,
        norm_epsilon=1e-5, normalise_top_k=False,
    ),
    "deepseek_v3": ModelConfig(  # deepseek-ai/DeepSeek-V3
        family="deepseek_v3", vocab_size=129280, hidden_size=7168, num_layers=61, num_attention_heads=128,
        num_key_value_heads=128, head_size=128, intermediate_size=18432, query_rank=1536, key_value_rank=512,
        rope_head_size=64, value_head_size=128, num_dense_layers=3, num_experts=256, num_experts_per_token=8,
        expert_intermediate_size=2048, num_shared_experts=1, num_expert_groups=8, num_groups_per_token=4,
        routed_scaling_factor=2.5,
    ),
    "qwen3_moe": ModelConfig(  # Qwen/Qwen3-30B-A3B
        family="qwen3_moe", vocab_size=151936, hidden_size=2048, num_layers=48, num_attention_heads=32,
        num_key_value_heads=4, head_size=128, num_experts=128, num_experts_per_token=8, expert_intermediate_size=768,
        rope_theta=1e6,
    ),
    "llama": ModelConfig(  # meta-llama/Llama-3.1-8B
        family="llama", vocab_size=128256, hidden_size=4096, num_layers=32, num_attention_heads=32,
        num_key_value_heads=8, head_size=128, num_experts=0, intermediate_size=14336, norm_epsilon=1e-5,
    ),
    "qwen3": ModelConfig(  # Qwen/Qwen3-0.6B
        family="qwen3", vocab_size=151936, hidden_size=1024, num_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_size=128, num_experts=0, intermediate_size=3072, tie_embeddings=True,
    ),
}  # fmt: skip
# Parameters that the authors' published files hold, from their safetensors headers.
PUBLISHED_PARAMETERS = {
    "mixtral": 46_702_792_704,
    "olmoe": 6_919_161_856,
    "deepseek_v3": 671_026_404_352,  # the main model; its 14,848 correction biases are buffers
    "qwen3_moe": 30_532_122_624,
    "llama": 8_030_261_248,
    "qwen3": 596_049_920,
}
OURS = {
    "architectures", "dtype", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings",
    "output_router_logits", "router_aux_loss_coef", "head_dim", "num_nextn_predict_layers",
}  # fmt: skip


# The configuration


@pytest.mark.parametrize("name", VARIANTS)
def test_build_model_config_round_trips_through_its_file(name: str, tmp_path: Path) -> None:
    config = build_model_config(VARIANTS[name], SEQUENCE_LENGTH)
    text = config.to_json_string(use_diff=False)
    (tmp_path / "config.json").write_text(text)
    loaded = json.loads(AutoConfig.from_pretrained(tmp_path).to_json_string(use_diff=False))
    assert {**loaded, "_name_or_path": ""} == json.loads(text)


@pytest.mark.parametrize(
    ("family", "theirs"), [("mixtral", MixtralConfig), ("olmoe", OlmoeConfig), ("deepseek_v3", DeepseekV3Config)]
)
def test_build_model_config_of_the_released_model_is_transformers_own_default(family: str, theirs: type[Any]) -> None:
    values = build_model_config(RELEASED[family], 4096).to_dict()
    # The class's default width of an expert is twice that of the model that it documents.
    expected = theirs(**({"intermediate_size": 1024} if family == "olmoe" else {})).to_dict()
    different = {key for key in values.keys() | expected.keys() if values.get(key) != expected.get(key)}
    assert different <= OURS


@pytest.mark.parametrize("family", RELEASED)
def test_count_parameters_of_the_released_model_is_what_its_files_hold(family: str) -> None:
    assert count_parameters(RELEASED[family], 4096) == PUBLISHED_PARAMETERS[family]


def test_model_buffers_of_the_released_deepseek_are_a_bias_for_each_expert_of_58_layers() -> None:
    with torch.device("meta"):
        buffers = model_buffers(build_model(RELEASED["deepseek_v3"], 4096))
    assert (len(buffers), sum(bias.numel() for bias in buffers.values())) == (58, 14_848)


def test_build_model_config_deepseek_announces_no_prediction_modules() -> None:
    # transformers' default announces one, and serving engines would look for its weights.
    values = json.loads(build_model_config(FAMILIES["deepseek_v3"], SEQUENCE_LENGTH).to_json_string(use_diff=False))
    assert values["num_nextn_predict_layers"] == 0


# The network


@pytest.mark.parametrize("name", VARIANTS)
def test_build_model_same_seed_is_the_same_network_in_float32(name: str) -> None:
    first, again, other = (model_tensors(build_model(VARIANTS[name], SEQUENCE_LENGTH, seed=seed)) for seed in (7, 7, 8))
    assert list(first) == list(again)
    assert all(torch.equal(tensor, again[key]) for key, tensor in first.items())
    assert not all(torch.equal(tensor, other[key]) for key, tensor in first.items())
    assert {tensor.dtype for tensor in first.values()} == {torch.float32}


@pytest.mark.parametrize("family", FAMILIES)
def test_build_model_every_matrix_starts_from_the_stated_deviation(family: str) -> None:
    model = FAMILIES[family]
    for name, tensor in model_tensors(build_model(model, SEQUENCE_LENGTH, seed=3)).items():
        if tensor.ndim >= 2:
            # Five standard errors of a standard deviation: sigma / sqrt(2n) each.
            assert abs(float(tensor.detach().std()) / model.initializer_range - 1) < 5 / (2 * tensor.numel()) ** 0.5, (
                name
            )
        else:
            start = 0.0 if name.endswith("e_score_correction_bias") else 1.0
            assert torch.equal(tensor, torch.full_like(tensor, start)), name


@pytest.mark.parametrize("name", VARIANTS)
def test_forward_sees_no_later_token(name: str) -> None:
    model = VARIANTS[name]
    network = build_model(model, SEQUENCE_LENGTH, seed=3)
    tokens = random_tokens(model)
    changed = tokens.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % model.vocab_size
    # A batch of experts' rows is cut otherwise when later tokens go elsewhere: equal to rounding, not to the bit.
    before, after = network(input_ids=tokens).logits, network(input_ids=changed).logits
    assert torch.allclose(before[:, :10], after[:, :10], rtol=0, atol=IMPLEMENTATION_TOLERANCE)
    assert not torch.allclose(before[:, 10:], after[:, 10:], rtol=0, atol=IMPLEMENTATION_TOLERANCE)


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "mixtral", "deepseek_v3"])
def test_forward_experts_implementations_agree(family: str) -> None:
    logits = []
    for implementation in ("eager", "grouped_mm"):
        shape = MOE if family != "deepseek_v3" else DEEPSEEK
        shape = {**shape, "head_size": 8} if family == "olmoe" else shape
        model = ModelConfig(family=family, experts_implementation=implementation, **shape)
        network = build_model(model, SEQUENCE_LENGTH, seed=5)
        assert network.config._experts_implementation == implementation
        logits.append(network(input_ids=random_tokens(model)).logits)
    assert torch.allclose(*logits, rtol=0, atol=IMPLEMENTATION_TOLERANCE)


# What cannot be built is refused with the key


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        ("olmoe", {"head_size": 10}, r"model\.head_size=10 .* 32/4"),
        ("olmoe", {"num_dense_layers": 1, "head_size": 8}, r"model\.num_dense_layers=1 .* 0 for olmoe"),
        ("qwen3_moe", {"num_dense_layers": 3}, r"model\.num_dense_layers=3 .* 0 to 2"),
        ("qwen3_moe", {"head_size": 9}, r"model\.head_size=9 .* even"),
        ("qwen3_moe", {"num_shared_experts": 1}, r"model\.num_shared_experts=1 .* qwen3_moe has no such part"),
        ("qwen3_moe", {"routed_scaling_factor": 2.5}, r"model\.routed_scaling_factor=2\.5"),
        ("qwen3_moe", {"router_bias_speed": 0.001}, r"model\.router_bias_speed=0\.001 .* 0: routers of qwen3_moe"),
        ("qwen3_moe", {"expert_intermediate_size": 20}, r"model\.expert_intermediate_size=20 .*multiple of 8.*eager"),
        ("mixtral", {"hidden_size": 36}, r"model\.hidden_size=36 .*multiple of 8.*eager"),
        ("mixtral", {"normalise_top_k": False}, r"model\.normalise_top_k=False .* mixtral"),
        ("mixtral", {"num_experts_per_token": 7}, r"model\.num_experts_per_token=7 .* between 1 and"),
        ("deepseek_v3", {"key_value_rank": 0}, r"model\.key_value_rank=0.*512"),
        ("deepseek_v3", {"rope_head_size": 0}, r"model\.rope_head_size=0.*64"),
        ("deepseek_v3", {"rope_head_size": 5}, r"model\.rope_head_size=5 .* even"),
        ("deepseek_v3", {"value_head_size": 0}, r"model\.value_head_size=0.*128"),
        ("deepseek_v3", {"num_shared_experts": 0}, r"model\.num_shared_experts=0"),
        ("deepseek_v3", {"query_rank": -1}, r"model\.query_rank=-1"),
        ("deepseek_v3", {"num_key_value_heads": 2}, r"model\.num_key_value_heads=2.*num_attention_heads=4"),
        ("deepseek_v3", {"num_expert_groups": 4}, r"model\.num_expert_groups=4 .* divide model\.num_experts=6"),
        ("deepseek_v3", {"num_expert_groups": 6}, r"model\.num_expert_groups=6 .* at least 2"),
        ("deepseek_v3", {"num_groups_per_token": 4}, r"model\.num_groups_per_token=4.*num_expert_groups=3"),
        (
            "deepseek_v3",
            {"num_groups_per_token": 1, "num_experts_per_token": 3},
            r"num_experts_per_token=3 .* at most 2",
        ),
        ("deepseek_v3", {"router_bias_speed": -0.1}, r"model\.router_bias_speed=-0\.1"),
        ("deepseek_v3", {"num_dense_layers": 3}, r"model\.num_dense_layers=3"),
        ("llama", {"num_experts": 4}, r"model\.num_experts=4 .* llama is dense"),
        ("llama", {"num_dense_layers": 1, "num_experts": 0}, r"model\.num_dense_layers=1 .* 0 for llama"),
        ("llama", {"key_value_rank": 8, "num_experts": 0}, r"model\.key_value_rank=8 .* llama has no such part"),
    ],
)
def test_model_config_impossible_shape_refused_naming_the_key(family: Any, change: dict[str, Any], words: str) -> None:
    shape = {"deepseek_v3": DEEPSEEK, "llama": SHAPE}.get(family, MOE)
    with pytest.raises(ConfigError, match=words):
        ModelConfig(family=family, **{**shape, **change})


@pytest.mark.parametrize(
    ("family", "given", "speed"),
    [("deepseek_v3", None, 0.001), ("deepseek_v3", 0.0, 0.0), ("deepseek_v3", 0.01, 0.01), ("mixtral", None, 0.0), ("mixtral", 0.0, 0.0)],
)  # fmt: skip
def test_bias_speed_default_is_the_familys(family: Any, given: float | None, speed: float) -> None:
    shape = DEEPSEEK if family == "deepseek_v3" else MOE
    assert ModelConfig(family=family, router_bias_speed=given, **shape).bias_speed == speed
