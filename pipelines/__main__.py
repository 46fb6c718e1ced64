"""The command line: ``pma COMMAND`` and ``python -m pipelines COMMAND``."""

from __future__ import annotations

import sys

import click

from pipelines.commands.configuration import config
from pipelines.commands.data import tokenize
from pipelines.commands.evidence import ablate, forecast, study
from pipelines.commands.jobs import submit
from pipelines.commands.lineage import rebuild
from pipelines.commands.merging import adopt, evaluate, export, merge, verify
from pipelines.commands.schedule import plan, tick, watch
from pipelines.commands.stages import continue_training, sft
from pipelines.commands.training import anneal, demo, pretrain, recover
from pipelines.commands.upkeep import gc, report, status
from pipelines.console import EXIT_USAGE, report_failure

COMMANDS: tuple[click.Command, ...] = (
    demo, pretrain, anneal, continue_training, sft, recover, merge, plan, tick, watch, adopt, export, evaluate, forecast, ablate, study, verify, rebuild, status, report, gc, submit, tokenize, config,
)  # fmt: skip


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="pmaflow", prog_name="pma")
def cli() -> None:
    """Pre-training with model merging on Ray: train, snapshot, merge, anneal, compare, report."""


for command in COMMANDS:
    cli.add_command(command)


def main() -> None:
    """Entry point of ``pma`` and ``python -m pipelines``."""
    try:
        code = cli.main(standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else "")
        sys.exit(EXIT_USAGE)
    except click.ClickException as error:
        hint = f"{error.ctx.command_path}: " if isinstance(error, click.UsageError) and error.ctx else ""
        report_failure(
            "UsageError", f"{hint}{error.format_message()} (see --help)", sys.stdout if "--json" in sys.argv else None
        )
        sys.exit(EXIT_USAGE)
    except click.exceptions.Abort:
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
