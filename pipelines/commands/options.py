"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

Command = Callable[..., Any]


def common(function: Command) -> Command:
    """Options that every command has."""
    function = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")(function)
    return click.option("--debug", is_flag=True, help="Show the traceback of a failure.")(function)


def configured(function: Command) -> Command:
    """Options of commands that start or continue a run from a configuration."""
    function = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")(function)
    return click.option("--run", "run_url", metavar="URL", help="Run folder; default runs/<config name>.")(function)
