"""Loading a configuration: layers, origins, and mistakes named before any work starts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.errors import ConfigError, UserError
from configs.load import (
    COMMAND_LINE,
    DEFAULT_ORIGIN,
    config_from_dict,
    config_names,
    config_to_dict,
    identity_of,
    known_keys,
    load_config,
    override_execution,
)
from configs.schema import Config
from configs.sections import ClusterConfig, TrackingConfig
from configs.training import TrainingConfig
from tasks.checkpoints.run_folder import RunFolder

WriteYaml = Callable[[str], str]


@pytest.fixture
def write_yaml(tmp_path: Path) -> WriteYaml:
    def write(text: str) -> str:
        path = tmp_path / "given.yaml"
        path.write_text(text)
        return str(path)

    return write


@pytest.mark.parametrize("name", config_names())
def test_load_shipped_configuration_is_possible(name: str) -> None:
    assert load_config(name).config.name == name


def test_load_layers_later_wins(write_yaml: WriteYaml) -> None:
    path = write_yaml("seed: 3\nmerge: {count: 4}")
    resolved = load_config(path, ("merge.count=5",))
    assert (resolved.config.seed, resolved.config.merge.count, resolved.config.merge.alpha) == (3, 5, 0.2)


def test_load_origins_say_where_each_value_came_from(write_yaml: WriteYaml) -> None:
    path = write_yaml("seed: 3\nmerge: {count: 4}")
    origins = load_config(path, ("merge.count=5",)).origins
    assert (origins["seed"], origins["merge.count"], origins["merge.alpha"]) == (path, COMMAND_LINE, DEFAULT_ORIGIN)
    assert set(origins) == set(known_keys())


def test_load_file_without_name_takes_the_stem(write_yaml: WriteYaml) -> None:
    assert load_config(write_yaml("seed: 3")).config.name == "given"


def test_load_empty_file_gives_defaults(write_yaml: WriteYaml) -> None:
    assert load_config(write_yaml("")).config == Config(name="given")


def test_load_lists_become_tuples() -> None:
    config = load_config("tiny", ("data.sources=[a,b]", "merge.comparison_counts=[2,4]")).config
    assert (config.data.sources, config.merge.comparison_counts) == (("a", "b"), (2, 4))


def test_load_null_override_clears_an_optional_value() -> None:
    assert load_config("tiny", ("training.max_gradient_norm=null",)).config.training.max_gradient_norm is None


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("sead=7", "unknown key 'sead' (command line); did you mean 'seed'?"),
        ("merge.cuont=7", "unknown key 'merge.cuont' (command line); did you mean 'merge.count'?"),
        ("seed", "override 'seed': expected key=value"),
        ("=3", "override '=3': expected key=value"),
        ("seed=abc", "seed (command line): Value 'abc'"),
        ("seed=1.5", "seed (command line): Value '1.5'"),
        ("seed=null", "seed (command line)"),
        ("model=3", "model=3 (command line): model is a section"),
        ("model.family=gpt", "model.family (command line): Invalid value 'gpt', expected one of ['qwen3_moe'"),
        ("model.num_experts=true", "model.num_experts (command line)"),
        ("data.sources=a", "data.sources (command line)"),
        ("merge.count=1", "merge.count=1 is not possible; allowed: at least 2"),
        ("seed=[1", "overrides 'seed=[1'"),
        ("seed=${nope}", "interpolation"),
    ],
)
def test_load_wrong_override_refused_with_key_and_hint(override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("tiny", (override,))
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sead: 7", "unknown key 'sead'"),
        ("model:\n", "model is a section"),
        ("- a\n- b", "expected keys and values at top level, got list"),
        ("seed: [1", "not readable as YAML"),
        ("seed: 1\nseed: 2", "duplicate key seed"),
        ("seed: x", "seed"),
        pytest.param(
            "5",
            "expected keys and values",
        ),
    ],
)
def test_load_wrong_file_refused_with_path(write_yaml: WriteYaml, text: str, expected: str) -> None:
    path = write_yaml(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert path in str(caught.value)
    assert expected in str(caught.value)


def test_load_binary_file_refused(tmp_path: Path) -> None:
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not readable as YAML"):
        load_config(str(path))


def test_load_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no configuration 'tiney'; did you mean 'tiny'\?.*Shipped: .*tiny"):
        load_config("tiney")


def test_load_missing_path_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no configuration"):
        load_config(str(tmp_path / "missing.yaml"))


def test_config_to_dict_and_back_through_json_is_equal() -> None:
    config = load_config("tiny", ("data.sources=[a,b]", "training.max_gradient_norm=null")).config
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"merge": {"count": 1}}, "merge.count=1"),
        ({"name": "x", "unheard_of": 1}, "unheard_of"),
        ({"seed": "x"}, "seed"),
    ],
)
def test_config_from_dict_damaged_refused(values: dict[str, object], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_dict(values)
    assert expected in str(caught.value)


def test_identity_execution_fields_do_not_take_part() -> None:
    config = Config(name="x")
    moved = dataclasses.replace(
        config,
        notes="elsewhere",
        training=dataclasses.replace(config.training, num_workers=4, fsdp_unit="model", max_restarts=9),
        tracking=TrackingConfig(uri="http://localhost", experiment="other"),
        cluster=ClusterConfig(address="auto"),
    )
    assert identity_of(moved) == identity_of(config)


@pytest.mark.parametrize(
    "override",
    ["seed=2", "training.total_tokens=4096000", "data.held_out_fraction=0.1", "merge.method=wma", "model.num_layers=3"],
)
def test_identity_fields_that_decide_bytes_take_part(override: str) -> None:
    assert identity_of(load_config("tiny", (override,)).config) != identity_of(load_config("tiny").config)


CHAT = ("data.format=chat", "data.sources=[x]")


def test_identity_of_runs_made_before_a_field_was_added_is_what_it_was() -> None:
    old = {"data.chat_template", "data.long_rows", "data.split_field"}
    assert old <= set(known_keys())
    assert not old & set(identity_of(load_config("tiny").config))
    chat = identity_of(load_config("tiny", (*CHAT, "data.long_rows=drop", "data.split_field=module")).config)
    assert {key: chat[key] for key in old & set(chat)} == {"data.long_rows": "drop", "data.split_field": "module"}


def test_added_field_that_goes_back_to_its_default_is_another_run(tmp_path: Path) -> None:
    dropping, refusing = (load_config("tiny", (*CHAT, *more)).config for more in (("data.long_rows=drop",), ()))
    with pytest.raises(ConfigError, match=r"data.long_rows=None differs from the run's 'drop'"):
        override_execution(dropping, ("data.long_rows=refuse",))
    run = RunFolder(str(tmp_path / "run"))
    run.begin(dropping)
    with pytest.raises(UserError, match=r"data.long_rows: run has 'drop', asked for None"):
        run.begin(refusing)


def test_identity_names_are_dotted_keys() -> None:
    keys = identity_of(Config(name="x"))
    assert keys["training.batch_tokens"] == TrainingConfig().batch_tokens
    assert set(keys) < set(known_keys())


def test_load_interpolation_refused_before_a_secret_is_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMA_TEST_SECRET", "verysecret")
    with pytest.raises(ConfigError, match="interpolation") as caught:
        load_config("tiny", ("tracking.experiment=${oc.env:PMA_TEST_SECRET}",))
    assert "verysecret" not in str(caught.value)
