"""The configurations that ship, held against the labels in their names and the paper's N and V."""

from __future__ import annotations

import pytest
import torch

from configs.load import SHIPPED, config_names, load_config
from configs.schema import Config
from tasks.models.build import build_model

# Labels of arXiv 2505.12082, section 3: billions of parameters, activated and total.
BILLIONS = {
    "moe-0.7b-7b": (0.7, 7),
    "moe-1.3b-13b": (1.3, 13),
    "moe-10b-100b": (10, 100),
    "dense-411m": (0.411, 0.411),
    "dense-2b": (2, 2),
    "dense-8b": (8, 8),
}
# Sections 4.1 and 4.5: N, and V in billions of tokens.
WINDOWS = {
    "moe-0.7b-7b": (10, 4),
    "moe-1.3b-13b": (10, 8),
    "moe-10b-100b": (10, 80),
    "dense-411m": (6, 2),
    "dense-2b": (6, 5),
    "dense-8b": (10, 15),
}
# The paper rounds its labels, and no layer shape hits one exactly.
LABEL_TOLERANCE = 0.07


def load(name: str) -> Config:
    return load_config(name).config


def count_parameters(config: Config) -> tuple[int, int]:
    """Activated and total parameters, embeddings and output head included; no memory is used for them."""
    model = config.model
    with torch.device("meta"):
        network = build_model(model, config.training.sequence_length)
    total = sum(parameter.numel() for parameter in network.parameters())
    if not model.is_moe:
        return total, total
    experts = sum(parameter.numel() for name, parameter in network.named_parameters() if ".experts." in name)
    assert experts > 0
    idle = experts * (model.num_experts - model.num_experts_per_token) // model.num_experts
    return total - idle, total


@pytest.mark.parametrize("name", config_names())
def test_shipped_config_loaded_by_name_has_its_name_and_says_whose_numbers_it_holds(name: str) -> None:
    config = load(name)

    assert config.name == name
    assert config.notes


def test_shipped_configs_of_the_paper_are_all_there() -> None:
    assert set(BILLIONS) | {"tiny"} <= set(config_names())


@pytest.mark.parametrize("name", BILLIONS)
def test_shipped_config_parameters_match_the_label_in_its_name(name: str) -> None:
    counted = count_parameters(load(name))

    assert [count / 1e9 for count in counted] == pytest.approx(BILLIONS[name], rel=LABEL_TOLERANCE)


@pytest.mark.parametrize("name", BILLIONS)
def test_shipped_config_header_states_the_counted_parameters(name: str) -> None:
    text = (SHIPPED / f"{name}.yaml").read_text()

    assert [f"{count:,}" in text for count in count_parameters(load(name))] == [True, True]


@pytest.mark.parametrize("name", WINDOWS)
def test_shipped_config_window_is_the_papers_to_within_a_batch(name: str) -> None:
    config = load(name)
    count, billions = WINDOWS[name]

    assert (config.merge.method, config.merge.count) == ("sma", count)
    assert abs(config.merge_interval_tokens - billions * 10**9) <= config.training.batch_tokens


@pytest.mark.parametrize("name", WINDOWS)
def test_shipped_config_decay_starts_and_ends_where_a_window_can_end(name: str) -> None:
    config = load(name)
    total, decay = config.training.total_tokens, config.schedule.decay_tokens

    assert 0.10 <= decay / total <= 0.15 + 1e-3
    assert config.schedule.decay_shape == "cosine"
    assert [tokens % config.merge_interval_tokens for tokens in (total, decay, config.anneal.tokens)] == [0, 0, 0]
    assert decay // config.merge_interval_tokens >= max(config.merge.comparison_counts)
