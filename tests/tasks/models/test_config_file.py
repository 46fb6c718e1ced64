"""Models brought by their config.json: the authors' own files, every family of ours there and back, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.errors import UserError
from configs.load import load_config
from tasks.models.build import build_model_config
from tasks.models.config_file import read_model_shape
from tests.conftest import Answer
from tests.tasks.models.families import FAMILIES, VARIANTS
from tests.tasks.models.test_build import RELEASED

# As published by their authors, in the keys of the transformers of their time.
QWEN3_30B_A3B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48,
    "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": True,
    "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
    "num_key_value_heads": 4, "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
OLMOE_1B_7B: dict[str, Any] = {
    "architectures": ["OlmoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "clip_qkv": None,
    "eos_token_id": 50279, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
    "intermediate_size": 1024, "max_position_embeddings": 4096, "model_type": "olmoe", "norm_topk_prob": False,
    "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16,
    "num_key_value_heads": 16, "output_router_logits": False, "pad_token_id": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "rope_theta": 10000.0, "router_aux_loss_coef": 0.01, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 50304,
}  # fmt: skip
MIXTRAL_8X7B: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": False,
    "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
PUBLISHED = {"qwen3_moe": QWEN3_30B_A3B, "olmoe": OLMOE_1B_7B, "mixtral": MIXTRAL_8X7B}


def save(folder: Path, values: object) -> str:
    (folder / "config.json").write_text(values if isinstance(values, str) else json.dumps(values))
    return str(folder)


# Read


@pytest.mark.parametrize("family", PUBLISHED)
def test_read_model_shape_of_a_published_file_is_the_released_model(family: str, tmp_path: Path) -> None:
    found = read_model_shape(save(tmp_path, PUBLISHED[family]))
    free = ("intermediate_size",) if family in {"olmoe", "mixtral"} else ()  # no layer of theirs is dense
    ignored = {"router_loss_coefficient": PUBLISHED[family]["router_aux_loss_coef"]}
    expected = dataclasses.asdict(RELEASED[family]) | ignored
    # The released file names a width for dense layers, of which the model has none.
    expected |= {"intermediate_size": 6144} if family == "qwen3_moe" else {}
    assert {k: v for k, v in dataclasses.asdict(found).items() if k not in free} == {
        k: v for k, v in expected.items() if k not in free
    }


@pytest.mark.parametrize("name", VARIANTS)
def test_read_model_shape_of_our_own_file_builds_the_same_network(name: str, tmp_path: Path) -> None:
    config = build_model_config(VARIANTS[name], 64)
    found = read_model_shape(save(tmp_path, config.to_json_string(use_diff=False)))
    ours, theirs = build_model_config(found, 64).to_dict(), config.to_dict()
    assert {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)} == set()


def test_read_model_shape_file_url_and_folder_are_the_same(tmp_path: Path) -> None:
    folder = save(tmp_path, MIXTRAL_8X7B)
    (tmp_path / "other.json").write_text(json.dumps(MIXTRAL_8X7B))
    expected = read_model_shape(folder)
    assert read_model_shape(f"{folder}/config.json") == read_model_shape(f"{folder}/other.json") == expected


# Refused


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        ("qwen3_moe", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_parameters="),
        ("qwen3_moe", {"mlp_only_layers": [5]}, r"mlp_only_layers=\[5\]"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
        ("qwen3_moe", {"attention_bias": True}, "attention_bias=True"),
        ("qwen3_moe", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("qwen3_moe", {"a_new_key": 1}, "a_new_key=1"),
        ("olmoe", {"clip_qkv": 8.0}, r"clip_qkv=8\.0"),
        ("mixtral", {"sliding_window": 4096}, "sliding_window=4096"),
        ("mixtral", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config="),
        ("mixtral", {"hidden_size": "wide"}, "does not accept it.*hidden_size"),
        ("mixtral", {"num_local_experts": 1}, r"model\.num_experts=1"),
        ("mixtral", {"model_type": "gpt2"}, "model_type is 'gpt2'; known families: qwen3_moe, olmoe"),
        ("mixtral", {"model_type": None}, "model_type is None"),
    ],
)
def test_read_model_shape_what_the_section_cannot_say_refused(
    family: str, change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"(?s){words}"):
        read_model_shape(save(tmp_path, {**PUBLISHED[family], **change}))


def test_read_model_shape_scoring_other_than_the_familys_refused(tmp_path: Path) -> None:
    # transformers would ignore the key and route by sigmoids.
    values = json.loads(build_model_config(FAMILIES["deepseek_v3"], 64).to_json_string(use_diff=False))
    save(tmp_path, {**values, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1})
    assert read_model_shape(str(tmp_path)).family == "deepseek_v3"
    with pytest.raises(UserError, match="scoring_func='softmax'"):
        read_model_shape(save(tmp_path, {**values, "scoring_func": "softmax"}))


@pytest.mark.parametrize(
    ("text", "words"), [("{", "not JSON"), ("[1]", "model_type is None"), ("3", "model_type is None")]
)
def test_read_model_shape_not_a_configuration_refused(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        read_model_shape(save(tmp_path, text))


def test_read_model_shape_nothing_there_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json there"):
        read_model_shape(str(tmp_path))


# The command


def test_config_from_model_prints_a_section_that_loads(pma: Callable[..., Answer], tmp_path: Path) -> None:
    folder = save(tmp_path, build_model_config(FAMILIES["deepseek_v3"], 64).to_json_string())
    said, as_json = pma("config", "from-model", folder), pma("config", "from-model", folder, "--json")
    assert (said.code, as_json.code) == (0, 0), said.stderr
    (tmp_path / "mine.yaml").write_text(said.stdout)
    assert "norm_epsilon" not in yaml.safe_load(said.stdout)["model"]
    loaded = load_config(str(tmp_path / "mine.yaml")).config.model
    assert dataclasses.asdict(loaded) == as_json.json["model"]
    assert loaded == dataclasses.replace(FAMILIES["deepseek_v3"], router_loss_coefficient=1e-4)


def test_config_from_model_of_an_unknown_family_ends_with_2(pma: Callable[..., Answer], tmp_path: Path) -> None:
    answer = pma("config", "from-model", save(tmp_path, {"model_type": "gpt2"}), "--json")
    assert answer.code == 2
    assert answer.json["error"] == "UserError"
