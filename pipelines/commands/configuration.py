"""Commands about configurations."""

from __future__ import annotations

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
