"""Parameter groups: where the names of known families fall, and that no tensor is left out."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.checkpoints.groups import group_names, group_of


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("model.embed_tokens.weight", "embedding"),
        ("transformer.wte.weight", "embedding"),
        ("embedding.word_embeddings.weight", "embedding"),
        ("lm_head.weight", "head"),
        ("output_layer.weight", "head"),
        ("model.norm.weight", "norm"),
        ("model.layers.0.self_attn.q_proj.weight", "layers.0.attention"),
        ("model.layers.12.self_attn.o_proj.weight", "layers.12.attention"),
        ("layers.3.attention.wq.weight", "layers.3.attention"),
        ("model.layers.3.self_attn.q_a_proj.weight", "layers.3.attention"),
        ("model.layers.3.self_attn.kv_a_proj_with_mqa.weight", "layers.3.attention"),
        ("model.layers.3.self_attn.kv_b_proj.weight", "layers.3.attention"),
        ("model.layers.3.self_attn.kv_a_layernorm.weight", "layers.3.norms"),
        ("model.layers.0.self_attn.q_norm.weight", "layers.0.norms"),
        ("model.layers.0.input_layernorm.weight", "layers.0.norms"),
        ("model.layers.0.mlp.gate.weight", "layers.0.router"),
        ("model.layers.0.mlp.gate.e_score_correction_bias", "layers.0.router"),
        ("model.layers.0.block_sparse_moe.gate.weight", "layers.0.router"),
        ("layers.1.mlp.router.weight", "layers.1.router"),
        ("model.layers.0.mlp.experts.7.gate_proj.weight", "layers.0.experts"),
        ("model.layers.0.block_sparse_moe.experts.7.w1.weight", "layers.0.experts"),
        ("model.layers.0.mlp.shared_experts.up_proj.weight", "layers.0.shared_expert"),
        ("model.layers.0.mlp.shared_expert.up_proj.weight", "layers.0.shared_expert"),
        ("model.layers.0.mlp.gate_proj.weight", "layers.0.feed_forward"),
        ("layers.0.feed_forward.w1.weight", "layers.0.feed_forward"),
        ("model.layers.5.mixer.conv1d.weight", "layers.5.mixer"),
        ("vision_tower.patch.weight", "vision_tower"),
        ("alone", "alone"),
    ],
)
def test_group_of_names_of_known_families(name: str, group: str) -> None:
    assert group_of(name) == group


def test_group_of_layers_with_a_common_beginning_are_apart() -> None:
    assert group_of("model.layers.1.self_attn.q_proj.weight") != group_of("model.layers.11.self_attn.q_proj.weight")


def test_group_of_a_word_that_only_ends_in_layers_is_no_layer() -> None:
    assert group_of("sublayers.3.self_attn.weight") == "sublayers"


def test_group_names_keeps_order_and_every_name() -> None:
    names = ["lm_head.weight", "model.layers.0.mlp.gate.weight", "model.norm.weight", "model.layers.0.mlp.gate.bias"]
    groups = group_names(names)
    assert list(groups) == ["head", "layers.0.router", "norm"]
    assert groups["layers.0.router"] == [names[1], names[3]]


WORDS = st.sampled_from(["model", "layers", "3", "mlp", "experts", "gate", "norm", "lm_head", "self_attn", "x", ""])
NAMES = st.one_of(st.text(max_size=12), st.lists(WORDS, max_size=7).map(".".join))


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.lists(NAMES, unique=True, max_size=20))
def test_group_names_every_name_in_exactly_one_group(names: list[str]) -> None:
    grouped = [name for members in group_names(names).values() for name in members]
    assert sorted(grouped) == sorted(names)
