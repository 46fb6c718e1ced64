"""Receipts: the durable note that one output shard of a merge is complete."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from cluster.errors import ObjectExists
from cluster.storage import Store
from configs.typed import parse_record
from tasks.checkpoints.digest import fingerprint
from tasks.checkpoints.manifest import Shard
from tasks.checkpoints.safetensors_header import CheckpointError
from tasks.merging.planned import MergeTask


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What one task did for one merge."""

    task: int
    """Number of the task."""
    output: int
    """Which of the task's merges."""
    identity: str
    """Fingerprint of the task for that merge; a receipt of another plan is ignored."""
    shard: Shard
    """What was written."""
    input_digests: tuple[dict[str, str], ...]
    """Per input of the plan, tensor name to the digest of the bytes that were read."""
    bytes_read: int
    """Bytes read by this execution; 0 for all but the first merge of a task."""
    peak_memory_bytes: int
    """Peak resident size of the worker process."""
    reused: bool = False
    """Whether an earlier attempt wrote the shard."""


def read_receipt(store: Store, task: MergeTask, output: int) -> Receipt | None:
    """Receipt of an earlier attempt, if its task is this one and its shard is there in full."""
    data = store.read_if_present(receipt_key(task.number))
    if data is None:
        return None
    try:
        values = json.loads(data)
        if values["identity"] != task_identity(task, output):
            return None
        receipt = parse_record(Receipt, {**values, "output": output, "bytes_read": 0, "reused": True})
    except (ValueError, KeyError, TypeError, CheckpointError):
        return None  # a damaged receipt only costs its task again
    if not store.exists(receipt.shard.key) or store.size(receipt.shard.key) != receipt.shard.bytes:
        return None
    return receipt


def write_receipt(store: Store, receipt: Receipt) -> None:
    """Leave ``receipt`` in its merge's folder."""
    data = json.dumps(dataclasses.asdict(receipt)).encode()
    try:
        store.create(receipt_key(receipt.task), data)
    except ObjectExists:
        # Another attempt at the same task, or the receipt of an abandoned plan.
        store.put(receipt_key(receipt.task), data)


def task_identity(task: MergeTask, output: int) -> str:
    """Fingerprint of what determines the shard's bytes and of where its inputs lie."""
    merge = task.outputs[output]
    tensors = [
        [
            tensor.name,
            list(merge.vectors[tensor.vector]),
            [tensor.read_as, tensor.accumulate, tensor.write_dtype],
            [_source(place) for place in tensor.sources],
        ]
        for tensor in task.tensors
    ]
    return fingerprint(
        {
            "identity": merge.identity,
            "shard": [task.part, *task.place],
            "inputs": list(task.input_urls),
            "tensors": tensors,
        }
    )


def receipt_key(number: int) -> str:
    """Key of a task's receipt below the output folder."""
    return f"receipts/task-{number:05d}.json"


def _source(place: Any) -> list[Any]:
    regions = [[r.key, r.offset, list(r.start), list(r.shape), r.archive_bytes] for r in place.regions]
    return [place.dtype, list(place.shape), place.digest, regions]
