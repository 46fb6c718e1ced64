"""Commands about what a run's weights are worth: forecast."""

from __future__ import annotations

from typing import Any

import click

from pipelines.commands.options import common
from pipelines.console import run_command
from pipelines.render_evidence import render_forecast


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
