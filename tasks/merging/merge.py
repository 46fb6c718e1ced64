"""Carry out a merge plan: run its tasks, publish the manifest under the lease, clear the receipts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from cluster.errors import ObjectMissing
from cluster.storage import Store, open_store
from configs.errors import UserError
from tasks.checkpoints.digest import content_digest
from tasks.checkpoints.groups import group_names
from tasks.checkpoints.manifest import (
    Manifest,
    Merge,
    MergeInput,
    model_digest,
    read_manifest,
)
from tasks.checkpoints.reader import Checkpoint
from tasks.checkpoints.run_folder import code_version
from tasks.checkpoints.safetensors_header import CheckpointError, TensorEntry
from tasks.checkpoints.writer import commit_manifest, write_side_files
from tasks.merging.execute import Receipt, execute_task
from tasks.merging.plan import MergePlan, MergeTask

COPIED_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
ATTEMPT_KEY = "receipts/attempt"
"""Marks a folder as an unpublished output of ours, so that a later attempt may go on in it."""
RunTasks = Callable[[Callable[[MergeTask], Receipt], list[MergeTask]], Iterable[Receipt]]
"""How tasks are fanned out: on local threads or as Ray tasks."""
POLICIES = {
    "weights": "method",
    "optimizer_moments": "reset",
    "integers": "equal",
    "keep_dtype": "*e_score_correction_bias",
}


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


def find_standing(plan: MergePlan) -> Manifest | None:
    """The manifest at the plan's output if it is this very merge; None if the output is free.

    Raises :class:`configs.errors.UserError` if the folder holds another merge or someone else's files.
    """
    store = open_store(plan.output_url)
    try:
        manifest, _ = read_manifest(store)
    except ObjectMissing:
        foreign = _foreign_keys(store)
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
    started = time.perf_counter()
    standing = find_standing(plan)
    if standing is not None:
        return nothing_done(standing)
    open_store(plan.output_url).put(ATTEMPT_KEY, plan.identity.encode())
    receipts = sorted(run_tasks(execute_task, list(plan.tasks)), key=lambda receipt: receipt.task)
    standing = _publish(plan, receipts, check_lease)
    _clear_receipts(plan)
    return MergeReport(
        manifest=standing,
        bytes_read=sum(receipt.bytes_read for receipt in receipts),
        bytes_written=sum(receipt.shard.bytes for receipt in receipts if not receipt.reused),
        seconds=time.perf_counter() - started,
        peak_memory_bytes=max((receipt.peak_memory_bytes for receipt in receipts), default=0),
        tasks_reused=sum(receipt.reused for receipt in receipts),
    )


def nothing_done(standing: Manifest) -> MergeReport:
    """Report of an invocation that found its merge published already."""
    return MergeReport(
        manifest=standing, bytes_read=0, bytes_written=0, seconds=0.0, peak_memory_bytes=0, tasks_reused=0
    )


def _publish(plan: MergePlan, receipts: list[Receipt], check_lease: Callable[[], None]) -> Manifest:
    store = open_store(plan.output_url)
    shards = tuple(receipt.shard for receipt in receipts)
    names = sorted(tensor.name for shard in shards for tensor in shard.tensors)
    _require_census(plan, names)
    newest = plan.inputs[-1].manifest
    manifest = Manifest(
        kind="merged",
        step=newest.step if newest else None,
        tokens_seen=newest.tokens_seen if newest else None,
        digest=model_digest(shards),
        state_digest=None,
        shards=shards,
        files=write_side_files(store, _copied_files(plan), shards, check_lease),
        parameter_groups=group_names(names),
        phase=newest.phase if newest else None,
        learning_rate=newest.learning_rate if newest else None,
        run_id=newest.run_id if newest else None,
        merge=Merge(
            method=plan.method,
            alpha=plan.alpha,
            inputs=tuple(_describe_input(plan, receipts, index) for index in range(len(plan.inputs))),
            weights=plan.weights,
            dtypes=plan.dtypes,
            policies=POLICIES,
            identity=plan.identity,
        ),
        code_version=code_version(),
        created=time.time(),
    )
    return commit_manifest(store, manifest, check_lease)


def _require_census(plan: MergePlan, written: list[str]) -> None:
    expected = sorted(plan.inputs[0].model)
    if written != expected:
        raise CheckpointError(
            f"{plan.output_url}: wrote {len(written)} tensors, the inputs hold {len(expected)}; nothing was published"
        )


def _describe_input(plan: MergePlan, receipts: list[Receipt], index: int) -> MergeInput:
    checkpoint = plan.inputs[index]
    manifest = checkpoint.manifest
    return MergeInput(
        url=checkpoint.url,
        digest=manifest.digest if manifest else _streamed_digest(checkpoint, receipts, index),
        manifest_digest=checkpoint.manifest_digest,
        step=manifest.step if manifest else None,
        tokens_seen=manifest.tokens_seen if manifest else None,
    )


def _streamed_digest(checkpoint: Checkpoint, receipts: list[Receipt], index: int) -> str:
    digests = {name: digest for receipt in receipts for name, digest in receipt.input_digests[index].items()}
    return content_digest(
        TensorEntry(**{**place.entry.__dict__, "digest": digests[name]}) for name, place in checkpoint.model.items()
    )


def _copied_files(plan: MergePlan) -> dict[str, bytes]:
    source = plan.inputs[-1].store
    files = {}
    for key in COPIED_FILES:
        data = source.read_if_present(key)
        if data is not None:
            if key == "config.json" and plan.dtypes["write"] != "as input":
                data = _with_dtype(data, plan.dtypes["write"])
            files[key] = data
    return files


def _with_dtype(config: bytes, dtype: str) -> bytes:
    values = json.loads(config)
    key = "torch_dtype" if "torch_dtype" in values and "dtype" not in values else "dtype"
    return json.dumps({**values, key: dtype}, indent=2).encode()


def _clear_receipts(plan: MergePlan) -> None:
    store = open_store(plan.output_url)
    for key in store.keys("receipts"):
        store.delete(key)


def _foreign_keys(store: Store) -> list[str]:
    """Objects in an output without a manifest that no attempt at a merge can have left there."""
    keys = [key for key in store.keys("") if not key.startswith(("receipts/", "leases/"))]
    return [] if store.exists(ATTEMPT_KEY) else keys
