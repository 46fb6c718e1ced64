"""Commands of the stages after pre-training: continue-training and sft."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from pipelines.commands.options import Command, common, configured
from pipelines.console import run_command
from pipelines.render_stages import render_stage


def join_seeds(arguments: Sequence[str]) -> list[str]:
    """``arguments`` with the whole numbers that follow ``--seeds`` joined by commas into its one value."""
    joined: list[str] = []
    for word in arguments:
        if len(joined) >= 2 and joined[-2] == "--seeds" and word.isdecimal():
            joined[-1] = f"{joined[-1]},{word}"
        else:
            joined.append(word)
    return joined


def parse_seeds(_context: click.Context, _option: click.Parameter, text: str | None) -> tuple[int, ...]:
    """The seeds of ``1,2,3``; :class:`click.BadParameter` for anything else."""
    words = [] if text is None else text.split(",")
    if not all(word.isdecimal() for word in words):
        raise click.BadParameter(f"{text!r}: expected whole numbers, such as --seeds 1 2 3")
    return tuple(int(word) for word in words)


class StageCommand(click.Command):
    """A command whose ``--seeds`` may be followed by several numbers."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse ``args``, with the numbers after ``--seeds`` as one value."""
        return super().parse_args(ctx, join_seeds(args))


def _stage_options(function: Command) -> Command:
    """Options that both commands have."""
    function = click.option(
        "--seeds",
        metavar="S...",
        callback=parse_seeds,
        help="Run the arms once per seed, as in --seeds 1 2 3 or --seeds 1,2,3; default: the configuration's seed.",
    )(function)
    function = click.option(
        "--control", metavar="URL", help="Checkpoint of the matched arm, which differs in its start alone."
    )(function)
    function = click.option(
        "--init", required=True, metavar="URL", help="Checkpoint to begin with: a snapshot, a merge, a foreign folder."
    )(function)
    return click.option(
        "--config", "config_name", required=True, metavar="C", help="Configuration: a name or a .yaml path."
    )(function)


@click.command("continue-training", cls=StageCommand)
@_stage_options
@configured
@common
def continue_training(**options: Any) -> int:
    """Train on from a checkpoint's weights: new data, new schedule, moments and counters from zero."""
    return _run("continue-training", **options)


@click.command(cls=StageCommand)
@_stage_options
@configured
@common
def sft(**options: Any) -> int:
    """Train on answers in conversations (data.format=chat), from a checkpoint's weights."""
    return _run("sft", **options)


def _run(
    stage: Any,
    *,
    config_name: str,
    init: str,
    control: str | None,
    seeds: tuple[int, ...],
    run_url: str | None,
    overrides: tuple[str, ...],
    as_json: bool,
    debug: bool,
) -> int:
    def work() -> dict[str, Any]:
        from configs.errors import UserError
        from configs.load import COMMAND_LINE, load_config
        from pipelines.stages import StageRequest, run_stage

        resolved = load_config(config_name, overrides)
        if seeds and resolved.origins["seed"] == COMMAND_LINE:
            raise UserError("seed=... beside --seeds: the arms take their seeds from --seeds; leave the other out")
        config = resolved.config
        request = StageRequest(stage=stage, init=init, control=control, seeds=seeds)
        return run_stage(run_url or f"runs/{config.name}", config, request)

    return run_command(work, render_stage, as_json=as_json, debug=debug)
