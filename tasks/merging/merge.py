"""Carry out merge plans: run their tasks, publish each manifest under its lease, clear the receipts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from cluster.errors import ObjectMissing
from cluster.storage import Store, open_store
from configs.errors import UserError
from tasks.checkpoints.manifest import MANIFEST_KEY, Manifest, read_manifest
from tasks.merging.execute import execute_task
from tasks.merging.planned import MergePlan, MergeTask
from tasks.merging.publish import publish
from tasks.merging.receipt import Receipt

ATTEMPT_KEY = "receipts/attempt"
"""Marks a folder as an unpublished output of ours, so that a later attempt may go on in it."""
RunTasks = Callable[[Callable[[MergeTask], list[Receipt]], list[MergeTask]], Iterable[list[Receipt]]]
"""How tasks are fanned out: on local threads or as Ray tasks."""


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What one invocation did."""

    manifest: Manifest
    """The merge that stands."""
    bytes_read: int
    """By this invocation."""
    bytes_written: int
    """By this invocation."""
    seconds: float
    """Of this invocation."""
    peak_memory_bytes: int
    """Largest worker; 0 if no work was needed."""
    tasks_reused: int
    """Shards of an earlier attempt that were kept."""
    is_new: bool = True
    """Whether this invocation published it; False if it stood already."""


def find_standing(plan: MergePlan) -> Manifest | None:
    """The manifest at the plan's output if it is this very merge; None if the output is free.

    Raises :class:`configs.errors.UserError` if the folder holds another merge or someone else's files.
    """
    store = open_store(plan.output_url)
    try:
        manifest, _ = read_manifest(store)
    except ObjectMissing:
        foreign = _foreign_keys(store)
        if foreign and store.exists(MANIFEST_KEY):
            return find_standing(plan)  # published by another driver since it was looked for
        if foreign:
            raise UserError(
                f"{plan.output_url} holds files that are not of this merge ({', '.join(foreign[:5])}); "
                "nothing was touched: choose an empty --output"
            ) from None
        return None
    if manifest.merge is None or manifest.merge.identity != plan.identity:
        what = f"a {manifest.kind} checkpoint" if manifest.merge is None else f"another merge ({manifest.merge.method})"
        raise UserError(f"{plan.output_url} holds {what}; nothing was touched: choose another --output")
    return manifest


def execute_merge(plan: MergePlan, run_tasks: RunTasks, check_lease: Callable[[], None]) -> MergeReport:
    """Run every task and publish; an output that already holds this merge is success without work.

    ``check_lease`` runs right before the manifest is created and raises if another driver took over.
    """
    return execute_merges([plan], run_tasks, [check_lease])[0]


def execute_merges(
    plans: Sequence[MergePlan], run_tasks: RunTasks, check_leases: Sequence[Callable[[], None]]
) -> list[MergeReport]:
    """Carry out ``plans``, all of one :func:`tasks.merging.plan.plan_merges`, and publish each under its own lease.

    What was read is counted in the first report alone. If all of them stand already this is success without work.
    """
    started = time.perf_counter()
    standing = [find_standing(plan) for plan in plans]
    if all(standing):
        return [nothing_done(manifest) for manifest in standing if manifest]
    for plan in plans:
        store = open_store(plan.output_url)
        store.abandon_uploads()
        store.put(ATTEMPT_KEY, plan.identity.encode())
    done = sorted(
        (receipt for receipts in run_tasks(execute_task, list(plans[0].tasks)) for receipt in receipts),
        key=lambda receipt: receipt.task,
    )
    reports = []
    for plan, check_lease in zip(plans, check_leases, strict=True):
        receipts = [receipt for receipt in done if receipt.output == plan.number]
        manifest = publish(plan, receipts, check_lease)
        _clear_receipts(plan)
        reports.append(_report(manifest, receipts, time.perf_counter() - started))
    return reports


def _report(manifest: Manifest, receipts: Sequence[Receipt], seconds: float) -> MergeReport:
    return MergeReport(
        manifest=manifest,
        bytes_read=sum(receipt.bytes_read for receipt in receipts),
        bytes_written=sum(receipt.shard.bytes for receipt in receipts if not receipt.reused),
        seconds=seconds,
        peak_memory_bytes=max((receipt.peak_memory_bytes for receipt in receipts), default=0),
        tasks_reused=sum(receipt.reused for receipt in receipts),
    )


def nothing_done(standing: Manifest) -> MergeReport:
    """Report of an invocation that found its merge published already."""
    return MergeReport(
        manifest=standing,
        bytes_read=0,
        bytes_written=0,
        seconds=0.0,
        peak_memory_bytes=0,
        tasks_reused=0,
        is_new=False,
    )


def _clear_receipts(plan: MergePlan) -> None:
    store = open_store(plan.output_url)
    for key in store.keys("receipts"):
        store.delete(key)


def _foreign_keys(store: Store) -> list[str]:
    """Objects in an output without a manifest that no attempt at a merge can have left there."""
    keys = [key for key in store.keys("") if not key.startswith(("receipts/", "leases/"))]
    return [] if store.exists(ATTEMPT_KEY) else keys
