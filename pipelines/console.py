"""The process edge: exit codes, one-line errors, JSON on stdout, logs on stderr."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

EXIT_DONE, EXIT_FAILED, EXIT_USAGE, EXIT_LEASE_HELD, EXIT_INTERRUPTED = 0, 1, 2, 75, 130
Render = Callable[[dict[str, Any]], str]


def run_command(work: Callable[[], dict[str, Any]], render: Render, *, as_json: bool, debug: bool) -> int:
    """Do ``work``, print its result, and turn errors into messages and exit codes."""
    configure_process()
    try:
        result = work()
    except KeyboardInterrupt:
        report_failure("Interrupted", "stopped; run the same command again to continue", as_json=as_json)
        return EXIT_INTERRUPTED
    except Exception as error:  # the process edge: every failure becomes a message and an exit code
        if debug:
            traceback.print_exc()
        report_failure(type(error).__name__, str(error), as_json=as_json)
        return exit_code_of(error)
    print(json.dumps(result, allow_nan=False, default=str) if as_json else render(result), flush=True)
    return int(result.get("exit_code", EXIT_DONE)) if isinstance(result.get("exit_code"), int) else EXIT_DONE


def exit_code_of(error: BaseException) -> int:
    """Exit code of the contract for ``error``."""
    from cluster.errors import LeaseHeld, LeaseLost
    from configs.errors import UserError

    if isinstance(error, UserError):
        return EXIT_USAGE
    if isinstance(error, (LeaseHeld, LeaseLost)):
        return EXIT_LEASE_HELD
    return EXIT_FAILED


def report_failure(kind: str, message: str, *, as_json: bool) -> None:
    """Print a failure as one message; with ``--json`` also as an object on stdout."""
    if as_json:
        print(json.dumps({"error": kind, "message": message}), flush=True)
    print(f"pma: {message or kind}", file=sys.stderr, flush=True)


def configure_process() -> None:
    """Logs to stderr; SIGTERM stops as cleanly as Ctrl-C; one thread for numeric libraries."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    for noisy in ("alembic", "mlflow", "ray", "botocore", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
