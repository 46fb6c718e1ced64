"""Commands that look at and look after a run: status, report, gc."""

from __future__ import annotations

from typing import Any

import click

from pipelines.commands.options import common
from pipelines.console import run_command
from pipelines.render import render_status
from pipelines.render_upkeep import render_gc


@click.command()
@click.option("--run", "run_url", required=True, metavar="URL", help="Run folder.")
@click.option("--follow", is_flag=True, help="Go on telling what happens, until the run is trained and merged.")
@click.option(
    "--every", "every_seconds", type=click.FloatRange(min=0.1), default=5.0, show_default=True, metavar="SECONDS"
)
@common
def status(run_url: str, follow: bool, every_seconds: float, as_json: bool, debug: bool) -> int:
    """Snapshots, merges done and due, segments, leases, tracking lag: from the run folder alone."""

    def work() -> dict[str, Any]:
        from pipelines import status as story

        if not follow:
            return story.status(run_url)
        if not as_json:
            click.echo(render_status(story.status(run_url)), err=True)
        return story.follow(run_url, every_seconds=every_seconds, tell=lambda line: click.echo(line, err=True))

    return run_command(work, render_status, as_json=as_json, debug=debug)


@click.command()
@click.option("--run", "run_url", required=True, metavar="URL", help="Run folder.")
@common
def report(run_url: str, as_json: bool, debug: bool) -> int:
    """Write the self-contained report.html of a run."""

    def work() -> dict[str, Any]:
        from pipelines.report.build import write_report

        return {"run": run_url, "report": write_report(run_url)}

    return run_command(work, lambda result: str(result["report"]), as_json=as_json, debug=debug)


@click.command()
@click.option("--run", "run_url", required=True, metavar="URL", help="Run folder.")
@click.option("--apply", is_flag=True, help="Take away what the plan says; without it nothing is touched.")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@common
def gc(run_url: str, apply: bool, overrides: tuple[str, ...], as_json: bool, debug: bool) -> int:
    """What retention keeps and takes away, and why: pma gc --run URL retention.keep_last=5."""

    def work() -> dict[str, Any]:
        from pipelines.gc import gc as story

        return story(run_url, apply=apply, overrides=overrides)

    return run_command(work, render_gc, as_json=as_json, debug=debug)
