"""Commands that send work to a Ray cluster: submit."""

from __future__ import annotations

from typing import Any

import click

from pipelines.commands.options import common
from pipelines.console import run_command
from pipelines.render_submit import render_submission


@click.command(context_settings={"ignore_unknown_options": True})
@click.option(
    "--address", metavar="URL", help="The cluster's dashboard; default RAY_API_SERVER_ADDRESS, RAY_ADDRESS, loopback."
)
@click.option(
    "--working-dir", default=".", show_default=True, metavar="DIR", help="Folder that is shipped (.rayignore)."
)
@click.option("--runtime-env-json", metavar="JSON", help='Ray runtime environment, such as {"pip": ["lm-eval"]}.')
@click.option("--env", multiple=True, metavar="NAME", help="Variable of this shell to hand to the job; repeatable.")
@click.option("--entrypoint-num-cpus", type=float, metavar="CPUS", help="CPUs that the driver holds; default none.")
@click.option("--no-wait", is_flag=True, help="Do not follow the job.")
@click.option("--stop", "stops", is_flag=True, help="Stop the job of this command instead.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- COMMAND...")
@common
def submit(
    command: tuple[str, ...],
    address: str | None,
    no_wait: bool,
    stops: bool,
    as_json: bool,
    debug: bool,
    **options: Any,
) -> int:
    """Run a pma command as a Ray job, or attach to the job that runs it: pma submit -- pretrain --config tiny --run URL."""

    def work() -> dict[str, Any]:
        from pipelines import submit as story

        if stops:
            return story.stop(command, address=address)
        return story.submit(command, address=address, wait=not no_wait, as_json=as_json, **options)

    # A --json behind the dashes asks for the pipeline's object, which is the answer here too.
    return run_command(work, render_submission, as_json=as_json or "--json" in command, debug=debug)
