"""The `ray up` file, read by Ray's own code as `ray up` reads it."""

from __future__ import annotations

import copy
from typing import Any

import jsonschema
import pytest
import yaml
from deploy_files import DEPLOY, Document
from ray.autoscaler._private.util import prepare_config, validate_config

TEXT = (DEPLOY / "ray-up" / "aws.yaml").read_text()


def prepared(config: Document) -> Document:
    """``config`` with the provider's defaults filled in, and checked by Ray."""
    full: Document = prepare_config(copy.deepcopy(config))
    validate_config(full)
    return full


@pytest.fixture
def config() -> Document:
    loaded: Document = yaml.safe_load(TEXT)
    return loaded


def test_file_is_accepted_and_no_default_comes_through(config: Document) -> None:
    full = prepared(config)
    commands = " ".join(str(value) for key, value in full.items() if key.endswith("_commands"))
    # Ray's defaults for AWS install a nightly wheel and start the dashboard on all addresses.
    assert "nightly" not in commands
    assert "wheels/latest" not in commands
    assert "0.0.0.0" not in commands
    assert {name: kind["max_workers"] for name, kind in full["available_node_types"].items()} == {
        "head": 0, "train": 17, "merge": 4,
    }  # fmt: skip


def test_nodes_are_as_the_docs_say(config: Document) -> None:
    kinds = config["available_node_types"]
    assert kinds["head"]["resources"] == {"CPU": 0}
    assert {name: kind["labels"] for name, kind in kinds.items()} == {name: {"pool": name} for name in kinds}
    assert [name for name, kind in kinds.items() if "InstanceMarketOptions" in kind["node_config"]] == ["merge"]
    assert all(kind["node_config"]["MetadataOptions"]["HttpTokens"] == "required" for kind in kinds.values())
    assert config["max_workers"] == sum(kind.get("max_workers", 0) for kind in kinds.values())


def test_token_reaches_every_node_and_every_start_asks_for_it(config: Document) -> None:
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        start = config[key][-1]
        assert start.index("RAY_AUTH_MODE=token") < start.index("ray start")
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]
    assert "--num-cpus=0" in config["head_start_ray_commands"][-1]


def test_ssh_is_not_open_to_everybody(config: Document) -> None:
    rules = config["provider"]["security_group"]["IpPermissions"]
    assert [(rule["FromPort"], rule["ToPort"]) for rule in rules] == [(22, 22)]
    assert not any(item["CidrIp"] == "0.0.0.0/0" for rule in rules for item in rule["IpRanges"])


def misspelt_key(config: Any) -> None:
    config["available_node_type"] = config["available_node_types"]


def misspelt_field_of_a_node(config: Any) -> None:
    config["available_node_types"]["train"]["label"] = {}


def text_for_processors(config: Any) -> None:
    config["available_node_types"]["train"]["resources"]["CPU"] = "16"


@pytest.mark.parametrize("spoil", [misspelt_key, misspelt_field_of_a_node, text_for_processors])
def test_spoilt_file_is_refused(config: Document, spoil: Any) -> None:
    spoil(config)
    with pytest.raises(jsonschema.ValidationError):
        prepared(config)


def test_head_that_is_no_node_type_is_refused(config: Document) -> None:
    config["head_node_type"] = "heads"
    with pytest.raises(ValueError, match="head_node_type"):
        prepared(config)
