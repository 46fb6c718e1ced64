"""The typed schema: defaults hold together, impossible values are refused by key."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from typing import Any

import pytest

from configs import schema
from configs.data import DataConfig
from configs.errors import ConfigError
from configs.merging import MergeConfig
from configs.model import ModelConfig
from configs.schema import Config
from configs.sections import AnnealConfig, EvaluationConfig
from configs.training import OptimizerConfig, ScheduleConfig, SnapshotConfig, TrainingConfig

SECTIONS = [value for value in vars(schema).values() if inspect.isclass(value) and dataclasses.is_dataclass(value)]


def test_config_defaults_are_possible() -> None:
    config = Config(name="x")
    assert config.training.total_steps * config.training.batch_tokens == config.training.total_tokens


@pytest.mark.parametrize(
    ("section", "values", "key"),
    [
        (ModelConfig, {"vocab_size": 0}, "model.vocab_size"),
        (ModelConfig, {"hidden_size": -1}, "model.hidden_size"),
        (ModelConfig, {"num_layers": 0}, "model.num_layers"),
        (ModelConfig, {"num_attention_heads": 0}, "model.num_attention_heads"),
        (ModelConfig, {"head_size": 0}, "model.head_size"),
        (ModelConfig, {"num_attention_heads": 4, "num_key_value_heads": 3}, "model.num_key_value_heads"),
        (ModelConfig, {"num_key_value_heads": 0}, "model.num_key_value_heads"),
        (ModelConfig, {"num_experts": 1, "num_experts_per_token": 1}, "model.num_experts"),
        (ModelConfig, {"num_experts": 4, "num_experts_per_token": 5}, "model.num_experts_per_token"),
        (ModelConfig, {"num_experts_per_token": 0}, "model.num_experts_per_token"),
        (ModelConfig, {"family": "llama"}, "model.num_experts"),
        (ModelConfig, {"router_loss_coefficient": -0.1}, "model.router_loss_coefficient"),
        (DataConfig, {"sources": ()}, "data.sources"),
        (DataConfig, {"held_out_fraction": 0.0}, "data.held_out_fraction"),
        (DataConfig, {"held_out_fraction": 1.0}, "data.held_out_fraction"),
        (TrainingConfig, {"num_workers": 0}, "training.num_workers"),
        (TrainingConfig, {"num_workers": 3}, "training.num_workers"),
        (TrainingConfig, {"sequence_length": 1}, "training.sequence_length"),
        (TrainingConfig, {"batch_tokens": 129}, "training.batch_tokens"),
        (TrainingConfig, {"batch_tokens": 0}, "training.batch_tokens"),
        (TrainingConfig, {"total_tokens": 2049}, "training.total_tokens"),
        (TrainingConfig, {"total_tokens": 0}, "training.total_tokens"),
        (TrainingConfig, {"max_gradient_norm": 0.0}, "training.max_gradient_norm"),
        (TrainingConfig, {"log_interval_steps": 0}, "training.log_interval_steps"),
        (TrainingConfig, {"max_restarts": -1}, "training.max_restarts"),
        (OptimizerConfig, {"beta1": 1.0}, "optimizer.beta1"),
        (OptimizerConfig, {"beta2": float("nan")}, "optimizer.beta2"),
        (OptimizerConfig, {"epsilon": 0.0}, "optimizer.epsilon"),
        (OptimizerConfig, {"weight_decay": -0.1}, "optimizer.weight_decay"),
        (ScheduleConfig, {"peak_learning_rate": 0.0}, "schedule.peak_learning_rate"),
        (ScheduleConfig, {"peak_learning_rate": float("nan")}, "schedule.peak_learning_rate"),
        (ScheduleConfig, {"warmup_tokens": -1}, "schedule.warmup_tokens"),
        (ScheduleConfig, {"decay_tokens": -1}, "schedule.decay_tokens"),
        (ScheduleConfig, {"final_learning_rate_fraction": 1.1}, "schedule.final_learning_rate_fraction"),
        (MergeConfig, {"count": 1}, "merge.count"),
        (MergeConfig, {"alpha": 0.0}, "merge.alpha"),
        (MergeConfig, {"alpha": 1.01}, "merge.alpha"),
        (MergeConfig, {"comparison_counts": (3, 1)}, "merge.comparison_counts"),
        (MergeConfig, {"shard_bytes": 0}, "merge.shard_bytes"),
        (MergeConfig, {"num_workers": 0}, "merge.num_workers"),
        (AnnealConfig, {"tokens": 0}, "anneal.tokens"),
        (AnnealConfig, {"final_learning_rate_fraction": -0.1}, "anneal.final_learning_rate_fraction"),
        (EvaluationConfig, {"slice_tokens": 0}, "evaluation.slice_tokens"),
        (EvaluationConfig, {"num_slices": 0}, "evaluation.num_slices"),
        (EvaluationConfig, {"batch_sequences": 0}, "evaluation.batch_sequences"),
    ],
)
def test_section_impossible_value_refused_by_key(section: type[Any], values: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        section(**values)
    assert str(caught.value).startswith(f"{key}=")


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"name": ""}, "name"),
        ({"name": "a/b"}, "name"),
        ({"name": "a b"}, "name"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**32}, "seed"),
        ({"model": ModelConfig(vocab_size=255)}, "model.vocab_size"),
        ({"schedule": ScheduleConfig(warmup_tokens=1, decay_tokens=8_192_000)}, "schedule.decay_tokens"),
        ({"snapshots": SnapshotConfig(interval_tokens=2049)}, "snapshots.interval_tokens"),
        ({"snapshots": SnapshotConfig(interval_tokens=0)}, "snapshots.interval_tokens"),
        ({"snapshots": SnapshotConfig(interval_tokens=8_194_048)}, "snapshots.interval_tokens"),
        ({"anneal": AnnealConfig(tokens=2049)}, "anneal.tokens"),
        ({"merge": MergeConfig(interval_tokens=102_401)}, "merge.interval_tokens"),
        ({"merge": MergeConfig(interval_tokens=0)}, "merge.interval_tokens"),
        ({"evaluation": EvaluationConfig(slice_tokens=100)}, "evaluation.slice_tokens"),
    ],
)
def test_config_values_impossible_together_refused_by_key(values: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config(**{"name": "x", **values})
    assert str(caught.value).startswith(f"{key}=")


@pytest.mark.parametrize(
    "values",
    [
        {"expert_intermediate_size": 0},
        {"intermediate_size": -1},
        {"initializer_range": -1.0},
        {"rope_theta": 0.0},
    ],
)
def test_model_unchecked_size_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ModelConfig(**values)


def test_schedule_infinite_learning_rate_refused() -> None:
    with pytest.raises(ConfigError):
        ScheduleConfig(peak_learning_rate=float("inf"))


def test_schedule_warmup_and_decay_filling_the_run_allowed() -> None:
    config = Config(name="x", schedule=ScheduleConfig(warmup_tokens=2048, decay_tokens=8_192_000 - 2048))
    assert config.schedule.decay_tokens == 8_189_952


def test_config_message_names_value_and_what_is_allowed() -> None:
    with pytest.raises(ConfigError, match=r"merge\.count=1 is not possible; allowed: at least 2"):
        MergeConfig(count=1)


@pytest.mark.parametrize("section", SECTIONS)
def test_section_field_assigned_refused(section: type[Any]) -> None:
    value = section(name="x") if section is Config else section()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, dataclasses.fields(section)[0].name, None)


@pytest.mark.parametrize("section", SECTIONS)
def test_section_every_field_has_a_docstring(section: type[Any]) -> None:
    body = ast.parse(inspect.getsource(section)).body[0]
    assert isinstance(body, ast.ClassDef)
    for node, after in zip(body.body, [*body.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign):
            documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            assert documented, f"{section.__name__}.{ast.unparse(node.target)} has no docstring"


@pytest.mark.parametrize(("family", "num_experts", "is_moe"), [("qwen3_moe", 8, True), ("llama", 0, False)])
def test_model_family_decides_whether_moe(family: Any, num_experts: int, is_moe: bool) -> None:
    assert ModelConfig(family=family, num_experts=num_experts).is_moe is is_moe


def test_merge_interval_unset_follows_snapshots() -> None:
    config = Config(name="x", snapshots=SnapshotConfig(interval_tokens=4096))
    assert config.merge_interval_tokens == 4096


def test_merge_interval_set_is_kept() -> None:
    config = Config(name="x", snapshots=SnapshotConfig(interval_tokens=4096), merge=MergeConfig(interval_tokens=8192))
    assert config.merge_interval_tokens == 8192


def test_training_steps_follow_from_tokens() -> None:
    training = TrainingConfig(total_tokens=20_480, batch_tokens=1024, sequence_length=64)
    assert (training.total_steps, training.batch_sequences) == (20, 16)
