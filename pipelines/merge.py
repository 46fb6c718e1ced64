"""One merge by hand: choose inputs, plan, execute on Ray or on local threads, publish."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from cluster.fan_out import fan_out_local, fan_out_processes, fan_out_ray
from cluster.lease import Lease, hold_lease, lease_key
from cluster.session import ray_session
from cluster.storage import is_shared_with_workers, open_store
from configs.errors import UserError
from tasks.checkpoints.reader import Checkpoint, open_checkpoint
from tasks.checkpoints.run_folder import RunFolder
from tasks.merging.merge import MergeReport, execute_merge, find_standing, nothing_done
from tasks.merging.methods import MethodChoice
from tasks.merging.plan import MergePlan, MergeTask, plan_merge
from tasks.merging.policy import DTYPE_NAMES
from tasks.merging.selection import WindowRule, select_window

BYTE_UNITS = {
    "": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40,
    "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MergeRequest:
    """What ``pma merge`` was asked for."""

    run: str | None
    """Run to choose a window from; None when ``inputs`` are given."""
    inputs: tuple[str, ...]
    """Checkpoints, oldest first."""
    count: int | None
    """N, with ``run``."""
    interval_tokens: int | None
    """V, with ``run``; None means the run's own."""
    end: int | None
    """Step of the newest input, with ``run``."""
    output: str | None
    """Folder of the result; None means ``<run>/merged/<name>``."""
    method: str
    """Merge method."""
    alpha: float | None
    """For ``ema``."""
    weights: str | None
    """Comma-separated, oldest first, for method ``weights``."""
    allow_unnormalised: bool
    """Accept explicit weights that do not sum to 1."""
    dtype: str | None
    """Output dtype; None keeps the inputs'."""
    workers: str
    """``ray``, ``local`` (a thread per CPU), or a number of local processes."""
    memory_budget: str | None
    """Most memory for one worker's buffers, such as ``32MiB``; None means the default chunk."""


def merge(request: MergeRequest, *, dry_run: bool = False) -> dict[str, Any]:
    """Plan and carry out one merge; returns the fields of ``pma merge --json``."""
    plan = build_plan(request)
    standing = find_standing(plan)
    if dry_run:
        return describe_plan(plan)
    if standing is not None:
        return describe(plan, nothing_done(standing))
    with merge_lease(plan.output_url) as lease, task_runner(request.workers, plan) as run_tasks:
        report = execute_merge(plan, run_tasks, lease.check)
    return describe(plan, report)


def build_plan(request: MergeRequest) -> MergePlan:
    """The plan of ``request``; every mistake in it is found here, before any tensor data is read."""
    if bool(request.run) == bool(request.inputs):
        raise UserError("give either --run URL with --count N, or --inputs URL..., not both and not neither")
    if request.dtype is not None and request.dtype not in DTYPE_NAMES:
        raise UserError(f"--dtype {request.dtype!r} is not known; known: {', '.join(DTYPE_NAMES)}")
    urls, output = _window(request) if request.run else (list(request.inputs), request.output)
    if output is None:
        raise UserError("--output URL is needed with --inputs")
    inputs = [_open_input(url, output) for url in urls]
    return plan_merge(
        inputs,
        _choice(request),
        output_url=open_store(output).url,
        dtype=request.dtype,
        buffer_bytes=None if request.memory_budget is None else parse_bytes(request.memory_budget),
    )


def _choice(request: MergeRequest) -> MethodChoice:
    return MethodChoice(
        method=request.method,
        alpha=request.alpha,
        weights=parse_numbers("--weights", request.weights),
        allow_unnormalised=request.allow_unnormalised,
    )


def parse_numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    """Numbers of ``0.2,0.3,0.5``; :class:`configs.errors.UserError` names ``option``."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{option} {text!r}: expected numbers with commas between, such as 0.2,0.3,0.5") from None


def describe_plan(plan: MergePlan) -> dict[str, Any]:
    """The plan without any work: what ``--dry-run`` prints."""
    return {
        "output": plan.output_url,
        "digest": None,
        "inputs": [
            {
                "url": c.url,
                "digest": c.manifest.digest if c.manifest else None,
                "step": c.manifest.step if c.manifest else None,
            }
            for c in plan.inputs
        ],
        "method": plan.method,
        "weights": list(plan.weights),
        "tasks": len(plan.tasks),
        "bytes_read": sum(task.bytes_read for task in plan.tasks),
        "bytes_written": sum(task.bytes_written for task in plan.tasks),
        "seconds": 0.0,
        "peak_memory_bytes": max(task.memory_bytes for task in plan.tasks),
        "plan": plan.rows(),
    }


def describe(plan: MergePlan, report: MergeReport) -> dict[str, Any]:
    """What was done."""
    standing = report.manifest.merge
    assert standing is not None
    own_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "output": plan.output_url,
        "digest": report.manifest.digest,
        "inputs": [{"url": item.url, "digest": item.digest, "step": item.step} for item in standing.inputs],
        "method": standing.method,
        "weights": list(standing.weights),
        "tasks": len(plan.tasks),
        "tasks_reused": report.tasks_reused,
        "bytes_read": report.bytes_read,
        "bytes_written": report.bytes_written,
        "seconds": round(report.seconds, 3),
        "peak_memory_bytes": report.peak_memory_bytes or own_peak,
    }


@contextmanager
def merge_lease(output_url: str) -> Iterator[Lease]:
    """The lease of one merge: in the run's ``leases`` folder for ``<run>/merged/<name>``, else in the output folder."""
    folder, _, name = output_url.rpartition("/")
    in_run = folder.endswith("/merged") and open_store(folder.removesuffix("/merged")).exists("run.json")
    store = open_store(folder.removesuffix("/merged")) if in_run else open_store(output_url)
    with hold_lease(store, f"merge-{name}" if in_run else "merge") as lease:
        yield lease
    if not in_run:
        # A published output needs no lease any more, and stays a plain Hugging Face folder.
        store.delete(lease_key("merge"))


@contextmanager
def task_runner(workers: str, plan: MergePlan) -> Iterator[Callable[..., Any]]:
    """How tasks are carried out: ``ray``, ``local`` (a thread per CPU) or a number of local processes."""
    if workers not in ("ray", "local") and not (workers.isdigit() and int(workers) > 0):
        raise UserError(f"--workers {workers!r}: expected ray, local or a number of local processes")
    if workers == "local":
        yield lambda function, tasks: fan_out_local(function, tasks, num_workers=os.cpu_count() or 1)
        return
    if not all(is_shared_with_workers(open_store(url)) for url in (plan.output_url, *(c.url for c in plan.inputs))):
        raise UserError(f"--workers {workers} cannot see memory:// storage; use --workers local")
    if workers == "ray":
        slots = os.cpu_count() or 1
        with ray_session(None, slots):
            yield lambda function, tasks: fan_out_ray(
                function, tasks, num_in_flight=4 * slots, memory_bytes=_memory_bytes
            )
        return
    yield lambda function, tasks: fan_out_processes(function, tasks, num_workers=int(workers))


def parse_bytes(text: str) -> int:
    """Bytes from ``1048576``, ``32MiB``, ``1.5GiB``, ``64MB``; :class:`configs.errors.UserError` for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(|B|KiB|MiB|GiB|TiB|kB|MB|GB|TB)", text.strip())
    if match is None:
        raise UserError(f"{text!r} is not a number of bytes; write 1048576, 32MiB or 1GiB")
    return int(float(match[1]) * BYTE_UNITS[match[2]])


def _memory_bytes(task: MergeTask) -> int:
    return task.memory_bytes


def _window(request: MergeRequest) -> tuple[list[str], str]:
    run = RunFolder(str(request.run))
    config = run.identity().config
    rule = WindowRule(
        method=request.method,
        count=request.count or config.merge.count,
        interval_tokens=request.interval_tokens or config.merge_interval_tokens,
        alpha=request.alpha,
    )
    window = select_window(run.snapshots(), rule, request.end)
    output = request.output or f"{run.url}/merged/{rule.output_name(window[-1].step)}"
    return [snapshot.url for snapshot in window], output


def _open_input(url: str, output: str) -> Checkpoint:
    checkpoint = open_checkpoint(url)
    if checkpoint.url == open_store(output).url:
        raise UserError(f"{url} is both an input and the output")
    return checkpoint
