"""Commands that train: demo, pretrain, anneal."""

from __future__ import annotations

from typing import Any

import click

from pipelines.commands.options import common, configured
from pipelines.console import run_command
from pipelines.render import render_demo, render_training


@click.command()
@click.option(
    "--config",
    "config_name",
    default="tiny",
    show_default=True,
    metavar="C",
    help="Configuration: a name or a .yaml path.",
)
@configured
@common
def demo(config_name: str, run_url: str | None, overrides: tuple[str, ...], as_json: bool, debug: bool) -> int:
    """The whole story on the embedded default; ends with the report's path."""

    def work() -> dict[str, Any]:
        from configs.load import load_config
        from pipelines.demo import demo as story

        config = load_config(config_name, overrides).config
        return story(run_url or f"runs/{config.name}", config)

    return run_command(work, render_demo, as_json=as_json, debug=debug)


@click.command()
@click.option("--config", "config_name", required=True, metavar="C", help="Configuration: a name or a .yaml path.")
@click.option("--fork", metavar="NAME", help="Branch a new run off the newest snapshot, with this configuration.")
@configured
@common
def pretrain(
    config_name: str, fork: str | None, run_url: str | None, overrides: tuple[str, ...], as_json: bool, debug: bool
) -> int:
    """Train, snapshot, merge on schedule, evaluate; run it again to continue."""

    def work() -> dict[str, Any]:
        from configs.load import load_config
        from pipelines.pretrain import pretrain as story

        config = load_config(config_name, overrides).config
        return story(run_url or f"runs/{config.name}", config, fork=fork)

    return run_command(work, render_training, as_json=as_json, debug=debug)


@click.command()
@click.option("--run", "run_url", required=True, metavar="URL", help="Run to branch from.")
@click.option("--from", "from_step", required=True, type=int, metavar="STEP", help="Snapshot to fork from.")
@click.option("--tokens", type=int, help="Token budget; default anneal.tokens of the run.")
@common
def anneal(run_url: str, from_step: int, tokens: int | None, as_json: bool, debug: bool) -> int:
    """Train a branch from a snapshot with a decaying learning rate."""

    def work() -> dict[str, Any]:
        from pipelines.anneal import anneal as story

        return story(run_url, from_step, tokens=tokens)

    return run_command(work, render_training, as_json=as_json, debug=debug)
