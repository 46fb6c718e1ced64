"""Commands about configurations."""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from pipelines.commands.options import common
from pipelines.console import run_command
from pipelines.render import render_config


@click.group()
def config() -> None:
    """Look at configurations."""


@config.command("show")
@click.argument("name", default="tiny")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@common
def config_show(name: str, overrides: tuple[str, ...], as_json: bool, debug: bool) -> int:
    """Every key, its value, and where the value came from."""

    def work() -> dict[str, Any]:
        from configs.load import config_to_dict, load_config

        resolved = load_config(name, overrides)
        return {"config": config_to_dict(resolved.config), "origins": resolved.origins}

    return run_command(work, render_config, as_json=as_json, debug=debug)


@config.command("list")
@common
def config_list(as_json: bool, debug: bool) -> int:
    """Configurations that ship."""

    def work() -> dict[str, Any]:
        from configs.load import config_names

        return {"configs": config_names()}

    return run_command(work, lambda result: "\n".join(result["configs"]), as_json=as_json, debug=debug)


@config.command("from-model")
@click.argument("url")
@common
def config_from_model(url: str, as_json: bool, debug: bool) -> int:
    """The model section for a Hugging Face model folder or config.json, ready for a configuration file."""

    def work() -> dict[str, Any]:
        from tasks.models.config_file import read_model_shape

        return {"url": url, "model": dataclasses.asdict(read_model_shape(url))}

    return run_command(work, render_model_section, as_json=as_json, debug=debug)


def render_model_section(result: dict[str, Any]) -> str:
    """YAML of the keys that are not at their default."""
    import yaml

    from configs.model import ModelConfig

    defaults = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
    model = {key: value for key, value in result["model"].items() if key == "family" or value != defaults[key]}
    return yaml.safe_dump({"model": model}, sort_keys=False).rstrip()
