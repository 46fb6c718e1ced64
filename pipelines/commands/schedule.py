"""Commands about what is due: plan, tick and watch."""

from __future__ import annotations

from typing import Any

import click

from pipelines.commands.options import common, configured
from pipelines.console import run_command
from pipelines.render_schedule import render_plan, render_tick, render_watch


@click.command()
@click.argument("pipeline", metavar="PIPELINE")
@click.option("--config", "config_name", required=True, metavar="C", help="Configuration: a name or a .yaml path.")
@configured
@common
def plan(
    pipeline: str, config_name: str, run_url: str | None, overrides: tuple[str, ...], as_json: bool, debug: bool
) -> int:
    """What a pipeline (pretrain, demo, continue-training, sft) has done and has left: steps, bytes, time. Nothing is started."""

    def work() -> dict[str, Any]:
        from configs.load import load_config
        from pipelines.plan import plan as story

        config = load_config(config_name, overrides).config
        return story(pipeline, config, run_url or f"runs/{config.name}")

    return run_command(work, render_plan, as_json=as_json, debug=debug)


@click.command()
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--run", "run_url", required=True, metavar="URL", help="Run folder.")
@click.option("--workers", default="local", show_default=True, help="ray, local (threads), or K local processes.")
@common
def tick(run_url: str, overrides: tuple[str, ...], workers: str, as_json: bool, debug: bool) -> int:
    """Do what is due on a run, once: adopt new checkpoints, merge, evaluate. For cron and its kin."""

    def work() -> dict[str, Any]:
        from pipelines.tick import tick as story

        return story(run_url, overrides=overrides, workers=workers)

    return run_command(work, render_tick, as_json=as_json, debug=debug)


@click.command()
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--run", "run_url", required=True, metavar="URL", help="Run folder.")
@click.option(
    "--every", "every_seconds", type=click.FloatRange(min=0.1), default=60.0, show_default=True, metavar="SECONDS"
)
@click.option("--until-done", is_flag=True, help="End once the run's last step is committed and merged.")
@click.option("--workers", default="local", show_default=True, help="ray, local (threads), or K local processes.")
@common
def watch(
    run_url: str,
    overrides: tuple[str, ...],
    every_seconds: float,
    until_done: bool,
    workers: str,
    as_json: bool,
    debug: bool,
) -> int:
    """Tick again and again until interrupted."""

    def work() -> dict[str, Any]:
        from pipelines.tick import watch as story

        return story(
            run_url,
            overrides=overrides,
            workers=workers,
            every_seconds=every_seconds,
            until_done=until_done,
            tell=lambda line: click.echo(line, err=True),
        )

    return run_command(work, render_watch, as_json=as_json, debug=debug)
