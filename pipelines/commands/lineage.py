"""Commands that go by the MLflow record of a checkpoint: rebuild."""

from __future__ import annotations

from typing import Any

import click

from pipelines.commands.options import common
from pipelines.console import run_command
from pipelines.render_evidence import render_rebuild


@click.command()
@click.option("--model", required=True, metavar="NAME@ALIAS", help="Registered model and alias, or NAME/VERSION.")
@click.option("--output", metavar="URL", help="Folder of the result; default where it was published.")
@click.option("--tracking-uri", metavar="URI", help="MLflow server; default MLFLOW_TRACKING_URI.")
@click.option("--workers", default="local", show_default=True, help="ray, local (threads), or K local processes.")
@common
def rebuild(model: str, output: str | None, tracking_uri: str | None, workers: str, as_json: bool, debug: bool) -> int:
    """Make a registered merge again from its MLflow record alone; exit 1 if its digest is another."""

    def work() -> dict[str, Any]:
        from pipelines.rebuild import rebuild as story

        return story(model, output=output, tracking_uri=tracking_uri, workers=workers)

    return run_command(work, render_rebuild, as_json=as_json, debug=debug)
