"""Commands about checkpoints: merge, adopt, export, verify, evaluate."""

from __future__ import annotations

from typing import Any

import click

from pipelines.commands.options import common
from pipelines.console import run_command
from pipelines.render import render_adoption, render_evaluation, render_export, render_merge, render_verification


@click.command()
@click.option("--run", "run_url", metavar="URL", help="Merge the last snapshots of this run.")
@click.option("--count", type=click.IntRange(min=1), help="Snapshots to merge (N).")
@click.option("--interval-tokens", type=click.IntRange(min=1), help="Tokens between them (V); default as the run.")
@click.option("--end", type=int, metavar="STEP", help="Step of the newest; default the last.")
@click.option("--inputs", multiple=True, metavar="URL...", help="Checkpoints, oldest first; all URLs that follow.")
@click.argument("more_inputs", nargs=-1, metavar="")
@click.option("--output", metavar="URL", help="Folder of the result.")
@click.option(
    "--across", multiple=True, metavar="BORDER", help="Let the window cross a border: phase, spike or fork; repeatable."
)
@click.option(
    "--method",
    default="sma",
    show_default=True,
    help="sma, wma, ema, wsm:linear|cosine|1-sqrt|list, power-ema, weights, greedy or search.",
)
@click.option("--alpha", type=float, help="For ema: weight of the newest, in (0, 1].")
@click.option("--weights", metavar="w1,w2,...", help="For method weights: one per input, oldest first, summing to 1.")
@click.option("--decay", metavar="d0,d1,...", help="For wsm:list: decay values of the inputs, from 1 downwards.")
@click.option("--width", type=float, help="For power-ema: relative width of the average, such as 0.1.")
@click.option("--grid", metavar="METHOD:N,...", help="Several merges in one read, such as sma:3,wma:10,ema=0.2:10.")
@click.option("--allow-unnormalised", is_flag=True, help="Accept --weights that do not sum to 1.")
@click.option("--dtype", help="Output dtype, such as bfloat16; default the inputs' own.")
@click.option("--policy", metavar="FILE", help="YAML: dtypes, methods and moments by tensor (docs/merging.md).")
@click.option("--workers", default="local", show_default=True, help="ray, local (threads), or K local processes.")
@click.option("--memory-budget", metavar="BYTES", help="Most memory for one worker's buffers, such as 32MiB.")
@click.option("--moe-report", is_flag=True, help="Say how experts and routers moved between the inputs.")
@click.option("--dry-run", is_flag=True, help="Print the plan; write nothing.")
@common
def merge(
    run_url: str | None,
    inputs: tuple[str, ...],
    more_inputs: tuple[str, ...],
    moe_report: bool,
    dry_run: bool,
    as_json: bool,
    debug: bool,
    **options: Any,
) -> int:
    """Merge checkpoints: of a run by rule, or any that are named."""

    def work() -> dict[str, Any]:
        from configs.errors import UserError
        from pipelines.merge import merge as story
        from pipelines.merge_request import MergeRequest

        if more_inputs and not inputs:
            raise UserError(f"unexpected argument {more_inputs[0]!r}; checkpoints go after --inputs")
        # The options that are left are named as the request's fields.
        request = MergeRequest(run=run_url, inputs=(*inputs, *more_inputs), **options)
        return story(request, dry_run=dry_run, moe_report=moe_report)

    return run_command(work, render_merge, as_json=as_json, debug=debug)


@click.command()
@click.option("--run", "run_url", required=True, metavar="URL", help="Run to register them in; made if it is new.")
@click.option("--from", "pattern", required=True, metavar="PATTERN", help="Folders: * and {step} stand for a part.")
@click.option("--format", "format_", type=click.Choice(["hf", "dcp"]), required=True, help="What the folders hold.")
@click.option("--tokens-per-step", type=click.IntRange(min=2), help="Tokens of a global batch; needed for a new run.")
@click.option("--phase", type=click.Choice(["warmup", "stable", "decay"]), help="Phase of the schedule they are of.")
@click.option("--marker", metavar="FILE", help="Adopt only folders with this file, which the trainer writes last.")
@click.option("--config", "config_name", metavar="C", help="Configuration that describes a new run's model and data.")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@common
def adopt(run_url: str, pattern: str, as_json: bool, debug: bool, **options: Any) -> int:
    """Register another trainer's checkpoints where they lie, without copying."""

    def work() -> dict[str, Any]:
        from pipelines.adopt import adopt as story

        return story(run_url, pattern, **options)

    return run_command(work, render_adoption, as_json=as_json, debug=debug)


@click.command()
@click.argument("url", metavar="URL")
@click.option("--output", required=True, metavar="DIR", help="Folder to write.")
@click.option("--format", "format_", type=click.Choice(["hf", "dcp"]), default="hf", show_default=True)
@click.option("--dtype", help="float32, bfloat16, ...; default as stored.")
@click.option("--max-shard", metavar="BYTES", help="Largest file, such as 5GiB; default 1GiB.")
@click.option("--workers", default="local", show_default=True, help="ray, local (threads), or K local processes.")
@common
def export(url: str, output: str, as_json: bool, debug: bool, **options: Any) -> int:
    """Write a checkpoint for other tools: Hugging Face safetensors or torch DCP."""

    def work() -> dict[str, Any]:
        from pipelines.export import export as story

        return story(url, output, **options)

    return run_command(work, render_export, as_json=as_json, debug=debug)


@click.command()
@click.argument("url", metavar="URL")
@click.option("--load", is_flag=True, help="Also run it in transformers, a merge beside the mean of its inputs.")
@common
def verify(url: str, load: bool, as_json: bool, debug: bool) -> int:
    """Check a checkpoint against its manifest and a merge against its inputs."""

    def work() -> dict[str, Any]:
        from pipelines.verify import verify as story

        return story(url, load=load)

    return run_command(work, render_verification, as_json=as_json, debug=debug)


@click.command()
@click.argument("urls", nargs=-1, metavar="[URL]...")
@click.option("--run", "run_url", metavar="URL", help="Run whose held-out text is used; default the run they lie in.")
@click.option("--missing", is_flag=True, help="All of --run (snapshots, merges, branches) that has no record yet.")
@click.option("--workers", default="local", show_default=True, help="ray, local (this process), or K local processes.")
@click.option(
    "--tasks", "asked", metavar="T,...", help="Also tasks of lm-evaluation-harness: names, .yaml files, folders."
)
@click.option("--lm-eval-python", metavar="PATH", help="Python that has the harness; default this one.")
@common
def evaluate(
    urls: tuple[str, ...],
    run_url: str | None,
    missing: bool,
    workers: str,
    asked: str | None,
    lm_eval_python: str | None,
    as_json: bool,
    debug: bool,
) -> int:
    """Held-out loss of checkpoints, and tasks."""

    def work() -> dict[str, Any]:
        from pipelines.evaluate import evaluate as story
        from pipelines.evaluate_tasks import open_harness

        harness = None if asked is None else open_harness(asked, lm_eval_python)
        return story(urls, run_url, missing=missing, workers=workers, harness=harness)

    return run_command(work, render_evaluation, as_json=as_json, debug=debug)
