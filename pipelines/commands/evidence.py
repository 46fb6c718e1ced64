"""Commands about what a run's weights are worth: ablate, forecast, study."""

from __future__ import annotations

from typing import Any

import click

from pipelines.commands.options import common
from pipelines.console import run_command
from pipelines.render_evidence import render_ablation, render_forecast, render_study


@click.command()
@click.option("--run", "run_url", required=True, metavar="URL", help="Run to forecast.")
@click.option(
    "--at", type=int, metavar="STEP", help="Step at which the anneal would end; default the newest evaluated."
)
@click.option("--tokens", type=int, help="Tokens over which the learning rate would fall; default anneal.tokens.")
@common
def forecast(run_url: str, at: int | None, tokens: int | None, as_json: bool, debug: bool) -> int:
    """What annealing would give now, with an interval from the anneals that were really made."""

    def work() -> dict[str, Any]:
        from pipelines.forecast import forecast as story

        return story(run_url, at=at, tokens=tokens)

    return run_command(work, render_forecast, as_json=as_json, debug=debug)


@click.command()
@click.option("--run", "run_url", required=True, metavar="URL", help="Run whose snapshots are merged.")
@click.option(
    "--beside", multiple=True, metavar="URL", help="Another run with an ablation: set the best V against model size."
)
@click.option("--keep", is_flag=True, help="Keep the merged weights; otherwise their losses alone stay.")
@click.option("--workers", default="local", show_default=True, help="ray, local (threads), or K local processes.")
@click.argument("settings", nargs=-1, metavar="[KEY=[...]]...")
@common
def ablate(
    run_url: str,
    beside: tuple[str, ...],
    keep: bool,
    workers: str,
    settings: tuple[str, ...],
    as_json: bool,
    debug: bool,
) -> int:
    """Merges over methods=[..] counts=[..] intervals=[..] alphas=[..] ends=[..], evaluated: which N and V to take."""

    def work() -> dict[str, Any]:
        from pipelines.ablate import ablate as story

        return story(
            run_url,
            settings,
            beside=beside,
            keep=keep,
            workers=workers,
            tell=lambda line: click.echo(line, err=True),
        )

    return run_command(work, render_ablation, as_json=as_json, debug=debug)


@click.command()
@click.option("--config", "name", required=True, metavar="C", help="Study: a name or a .yaml path.")
@click.option("--quick", is_flag=True, help="The study's smaller form.")
@click.option("--run", "url", metavar="PATH", help="Folder of the study; default runs/<study name>.")
@click.option("--output", metavar="FOLDER", help="Where the page goes; default <run>/page.")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@common
def study(
    name: str, quick: bool, url: str | None, output: str | None, overrides: tuple[str, ...], as_json: bool, debug: bool
) -> int:
    """Repeat the paper's experiments and judge each of its findings by a stated rule; the same command continues."""

    def work() -> dict[str, Any]:
        from configs.study import load_study
        from pipelines.study.story import study as story

        config = load_study(name, overrides, quick=quick)
        return story(
            url or f"runs/{config.name}",
            config,
            output=output,
            tell=lambda step: click.echo(f"study: {step}", err=True),
        )

    return run_command(work, render_study, as_json=as_json, debug=debug)
