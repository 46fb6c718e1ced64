"""Time from submitting a job to its first log line: ``python -m benchmarks.submit --address http://head:8265 [--repeats 5]``.

Needs a running cluster and its token (RAY_AUTH_MODE, RAY_AUTH_TOKEN). The first job also uploads and unpacks the working
directory; the others find it there. The command is the smallest: it starts, prints, ends.
"""

from __future__ import annotations

import argparse
import json
import secrets
import statistics
import time

from cluster.job_log import follow
from cluster.jobs import JobRequest, JobServer
from pipelines.submit import build_runtime_env

ENTRYPOINT = "python -m pipelines config list"
EXPECTED = "tiny"
"""Printed by the command itself; what comes before is Ray's."""


def main() -> None:
    """Submit one after another; print one JSON object of seconds since the submission."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--address", default=None)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    started = time.perf_counter()
    server = JobServer(options.address)
    connected = time.perf_counter() - started
    first, *others = [measure(server) for _ in range(1 + options.repeats)]
    medians = {key: round(statistics.median(row[key] for row in others), 2) for key in first}
    print(json.dumps({"connect": round(connected, 2), "first": first, "medians": medians, "repeats": options.repeats}))


def measure(server: JobServer) -> dict[str, float]:
    """Seconds from the submission until it was taken, Ray's first line, the driver's first line, and the end."""
    seen: dict[str, float] = {}
    log = ""

    def watch(text: str) -> None:
        nonlocal log
        log += text
        seen.setdefault("ray_line", time.perf_counter() - started)
        if EXPECTED in log:
            seen.setdefault("driver_line", time.perf_counter() - started)

    started = time.perf_counter()
    job = server.submit_or_attach(
        JobRequest(
            name=f"benchmark-{secrets.token_hex(4)}",
            entrypoint=ENTRYPOINT,
            runtime_env=build_runtime_env(".", None, ()),
        )
    )
    taken = time.perf_counter() - started
    state = follow(server, job.submission_id, watch)
    assert state.exit_code == 0, log
    ended = time.perf_counter() - started
    return {key: round(value, 2) for key, value in {"taken": taken, **seen, "ended": ended}.items()}


if __name__ == "__main__":
    main()
