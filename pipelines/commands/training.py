"""Commands that train, and the one that says how training goes on: demo, pretrain, anneal, recover."""

from __future__ import annotations

from typing import Any, Literal

import click

from pipelines.commands.options import common, configured
from pipelines.console import run_command
from pipelines.render import render_demo, render_training
from pipelines.render_recovery import render_recovery


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


@click.command()
@click.option("--run", "run_url", required=True, metavar="URL", help="Run that went wrong.")
@click.option("--onset", type=int, metavar="STEP", help="First step of the trouble; default: what the detector found.")
@click.option("--count", type=click.IntRange(min=1), help="Healthy snapshots to merge; 1 goes back to one as it is.")
@click.option("--moments", type=click.Choice(["merge", "newest", "reset"]), help="What becomes of Adam's moments.")
@click.option(
    "--learning-rate-scale", type=click.FloatRange(0, 1, min_open=True), metavar="X", help="Factor on the LR."
)
@click.option("--rewarm-tokens", type=click.IntRange(min=0), metavar="TOKENS", help="Tokens of learning-rate re-warm.")
@click.option("--keep-data", is_flag=True, help="Read the data of the trouble again instead of skipping it.")
@click.option("--dry-run", is_flag=True, help="Say what would be done; nothing is written.")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@common
def recover(
    run_url: str,
    onset: int | None,
    count: int | None,
    moments: Literal["merge", "newest", "reset"] | None,
    learning_rate_scale: float | None,
    rewarm_tokens: int | None,
    keep_data: bool,
    dry_run: bool,
    overrides: tuple[str, ...],
    as_json: bool,
    debug: bool,
) -> int:
    """Go back to before a loss spike by hand: merge healthy snapshots, and let the run go on from there."""

    def work() -> dict[str, Any]:
        from pipelines.recover import recover as story
        from tasks.recovery.policy import Wish

        wish = Wish(
            count=count,
            moments=moments,
            learning_rate_scale=learning_rate_scale,
            rewarm_tokens=rewarm_tokens,
            skip_data=not keep_data,
        )
        return story(run_url, wish, onset=onset, dry_run=dry_run, overrides=overrides)

    return run_command(work, render_recovery, as_json=as_json, debug=debug)
