"""The process edge: exit codes, one-line errors, JSON on stdout, logs on stderr."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, TextIO

from configs.json_numbers import finite_or_none

EXIT_DONE, EXIT_FAILED, EXIT_USAGE, EXIT_LEASE_HELD, EXIT_INTERRUPTED = 0, 1, 2, 75, 130
Render = Callable[[dict[str, Any]], str]


def run_command(work: Callable[[], dict[str, Any]], render: Render, *, as_json: bool, debug: bool) -> int:
    """Do ``work``, print its result, and turn errors into messages and exit codes.

    A result whose ``ok`` is False (a check that found something) is printed and ends with 1.
    """
    configure_process()
    answer = reserve_stdout()
    try:
        result = work()
    except KeyboardInterrupt as stop:
        message = str(stop) or "stopped; what was committed is safe, run the same command again to continue"
        report_failure("Interrupted", message, answer if as_json else None)
        return EXIT_INTERRUPTED
    except Exception as error:  # noqa: BLE001  the process edge: every failure becomes a message and an exit code
        if debug:
            traceback.print_exc()
        report_failure(type(error).__name__, str(error), answer if as_json else None, answer_of(error))
        return exit_code_of(error)
    print(json.dumps(finite_or_none(result), allow_nan=False) if as_json else render(result), file=answer, flush=True)
    return EXIT_FAILED if result.get("ok") is False else EXIT_DONE


def reserve_stdout() -> TextIO:
    """Keep stdout for the answer alone: whatever libraries and child processes print there goes to stderr."""
    sys.stdout.flush()
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answer


def exit_code_of(error: BaseException) -> int:
    """Exit code of the contract for ``error``."""
    from cluster.errors import JobFailed, LeaseHeld, LeaseLost
    from configs.errors import UserError

    if isinstance(error, UserError):
        return EXIT_USAGE
    if isinstance(error, (LeaseHeld, LeaseLost)):
        return EXIT_LEASE_HELD
    if isinstance(error, JobFailed):
        return error.exit_code
    return EXIT_FAILED


def answer_of(error: BaseException) -> dict[str, object]:
    """What the pipeline of a failed job answered itself: it stands for the failure."""
    from cluster.errors import JobFailed

    return error.answer if isinstance(error, JobFailed) else {}


def report_failure(kind: str, message: str, answer: TextIO | None, details: dict[str, object] | None = None) -> None:
    """Say what failed on stderr; with ``--json`` (an ``answer`` stream) also as one object, with ``details``."""
    if answer is not None:
        values = finite_or_none({"error": kind, "message": message, **(details or {})})
        print(json.dumps(values, allow_nan=False), file=answer, flush=True)
    print(f"pma: {message or kind}", file=sys.stderr, flush=True)


def configure_process() -> None:
    """Logs to stderr; SIGTERM stops as cleanly as Ctrl-C; one thread for numeric libraries."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    for noisy in ("alembic", "mlflow", "ray", "botocore", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    # Explicitly, because a shell starts background jobs with SIGINT ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
