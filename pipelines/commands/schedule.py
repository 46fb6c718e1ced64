"""Commands that do what is due: tick and watch."""

from __future__ import annotations

from typing import Any

import click

from pipelines.commands.options import common
from pipelines.console import run_command
from pipelines.render import render_tick, render_watch


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
