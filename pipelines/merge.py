"""Merges by hand: choose inputs, plan, execute on Ray, on local threads or in local processes, publish."""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from cluster.errors import LeaseLost
from cluster.fan_out import fan_out_local, fan_out_processes, fan_out_ray
from cluster.lease import Lease, hold_lease, lease_key
from cluster.session import ray_session
from cluster.storage import is_shared_with_workers, open_store
from configs.errors import UserError
from pipelines.merge_request import Chosen, MergeRequest, build_plans, choose
from tasks.checkpoints.pins import hold_pins
from tasks.merging.merge import MergeReport, execute_merges, find_standing, nothing_done
from tasks.merging.methods import EVALUATED_METHODS
from tasks.merging.planned import MergePlan, MergeTask
from tasks.peak_memory import peak_resident_bytes

RunTasks = Callable[[Callable[[Any], Any], Sequence[Any], Callable[[], bool]], Iterable[Any]]
"""How tasks are fanned out: results as they complete, until the third argument says that the lease is lost."""


def merge(request: MergeRequest, *, dry_run: bool = False, moe_report: bool = False) -> dict[str, Any]:
    """Plan and carry out what ``request`` asks for; returns the fields of ``pma merge --json``."""
    require_workers(request.workers)
    chosen = choose(request)
    if request.method in EVALUATED_METHODS:
        from pipelines.merge_search import choose_by_evaluation

        with hold_pins([] if dry_run else chosen.inputs):
            chosen = choose_by_evaluation(request, chosen, dry_run=dry_run)
    plans = build_plans(request, chosen)
    extra = _extra(chosen, moe_report=moe_report)
    standing = [find_standing(plan) for plan in plans]
    if dry_run:
        return {**_summary(request, [describe_plan(plan) for plan in plans]), **extra}
    todo = [recipe for recipe, manifest in zip(chosen.recipes, standing, strict=True) if manifest is None]
    reports = iter(carry_out(request.workers, build_plans(request, chosen, todo)) if todo else [])
    done = [nothing_done(manifest) if manifest is not None else next(reports) for manifest in standing]
    described = [describe(plan, report) for plan, report in zip(plans, done, strict=True)]
    return {**_summary(request, described), **extra}


def carry_out(workers: str, plans: Sequence[MergePlan]) -> list[MergeReport]:
    """Execute ``plans``, which share their tasks, under a lease each, with their inputs pinned."""
    with ExitStack() as stack:
        stack.enter_context(hold_pins(plans[0].inputs))
        leases = [stack.enter_context(merge_lease(plan.output_url)) for plan in plans]
        places = [*(plan.output_url for plan in plans), *(checkpoint.store.url for checkpoint in plans[0].inputs)]
        run_tasks = stack.enter_context(task_runner(workers, places))

        def is_lost() -> bool:
            return any(lease.is_lost() for lease in leases)

        return execute_merges(
            plans, lambda function, tasks: run_tasks(function, tasks, is_lost), [lease.check for lease in leases]
        )


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
    own_peak = peak_resident_bytes()
    return {
        "output": plan.output_url,
        "digest": report.manifest.digest,
        "inputs": [{"url": item.url, "digest": item.digest, "step": item.step} for item in standing.inputs],
        "method": standing.method,
        "weights": list(standing.weights),
        "policies": standing.policies,
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
    lease_name = f"merge-{name}" if in_run else "merge"
    try:
        with hold_lease(store, lease_name) as lease:
            yield lease
    except concurrent.futures.CancelledError:
        if lease.is_lost():
            raise LeaseLost(f"another driver took over the merge at {output_url}; nothing was published") from None
        raise
    except UserError:
        # A folder that is refused is left as it was found.
        if lease.was_given_back and not in_run:
            store.delete(lease_key(lease_name))
        raise
    # What is published needs no lease any more: whoever takes it finds the merge standing. A plain Hugging Face folder
    # stays one, and a run with thousands of merges has few leases to look at.
    if lease.was_given_back:
        store.delete(lease_key(lease_name))


def require_workers(workers: str) -> None:
    """Refuse what ``--workers`` does not know."""
    if workers not in ("ray", "local") and not (workers.isdigit() and int(workers) > 0):
        raise UserError(f"--workers {workers!r}: expected ray, local or a number of local processes")


@contextmanager
def task_runner(workers: str, urls: Sequence[str], nodes: str | None = None) -> Iterator[RunTasks]:
    """How tasks that read and write at ``urls`` are carried out.

    ``ray`` (on nodes of the label ``nodes``), ``local`` (a thread per CPU) or a number of local processes.
    """
    stores = [open_store(url) for url in urls]
    if workers == "local":
        # Where reads and commits wait for a network, twice as many tasks keep the processors at work.
        waits = any(store.reads_ahead for store in stores)
        threads = (os.cpu_count() or 1) * (2 if waits else 1)
        yield lambda function, tasks, is_lost: fan_out_local(
            function, tasks, num_workers=threads, should_cancel=is_lost
        )
        return
    if not all(is_shared_with_workers(store) for store in stores):
        raise UserError(f"--workers {workers} cannot see memory:// storage; use --workers local")
    if workers == "ray":
        slots = os.cpu_count() or 1
        with ray_session(None, slots):
            yield lambda function, tasks, is_lost: fan_out_ray(
                function,
                tasks,
                num_in_flight=4 * slots,
                memory_bytes=_memory_bytes,
                should_cancel=is_lost,
                nodes=nodes,
            )
        return
    yield lambda function, tasks, is_lost: fan_out_processes(
        function, tasks, num_workers=int(workers), should_cancel=is_lost
    )


def _summary(request: MergeRequest, merges: list[dict[str, Any]]) -> dict[str, Any]:
    """One merge's fields as they are; those of a grid below ``merges``, with what all of them cost together."""
    if not request.grid:
        return merges[0]
    return {
        "output": request.output or f"{request.run}/merged",
        "merges": merges,
        "tasks": merges[0]["tasks"],
        "bytes_read": max(item["bytes_read"] for item in merges),
        "bytes_written": sum(item["bytes_written"] for item in merges),
        "seconds": max(item["seconds"] for item in merges),
        "peak_memory_bytes": max(item["peak_memory_bytes"] for item in merges),
    }


def _extra(chosen: Chosen, *, moe_report: bool) -> dict[str, Any]:
    extra: dict[str, Any] = {"notes": chosen.notes}
    if moe_report:
        from tasks.merging.moe_report import describe_experts

        extra["moe_report"] = describe_experts(chosen.inputs)
    return extra


def _memory_bytes(task: MergeTask) -> int:
    return task.memory_bytes
