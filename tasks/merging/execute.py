"""Execute one merge task: stream its ranges, add, hash, write its output shard, leave a receipt.

Runs in any process that reaches the storage. Safe to run twice or at once: the same inputs give the
same bytes, and a shard never overwrites another.
"""

from __future__ import annotations

import dataclasses
import json
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cluster.errors import ObjectExists
from cluster.storage import Store, open_store
from configs.typed import parse_record
from tasks.checkpoints.digest import fingerprint, new_hasher
from tasks.checkpoints.manifest import Shard
from tasks.checkpoints.safetensors_header import DTYPE_BYTES, CheckpointError, TensorEntry
from tasks.checkpoints.writer import write_shard
from tasks.merging.kernel import FLOAT_DTYPES, ChunkSum, encode, first_nonfinite, first_nonfinite_stored
from tasks.merging.plan import MergeTask, PlannedTensor


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """The durable note that a task's shard is complete."""

    task: int
    """Number of the task."""
    identity: str
    """Fingerprint of the task; a receipt of another plan is ignored."""
    shard: Shard
    """What was written."""
    input_digests: tuple[dict[str, str], ...]
    """Per input, tensor name to the digest of the bytes that were read."""
    bytes_read: int
    """Bytes read by this execution."""
    peak_memory_bytes: int
    """Peak resident size of the worker process."""
    reused: bool = False
    """Whether an earlier attempt wrote the shard."""


def execute_task(task: MergeTask) -> Receipt:
    """Run ``task``, or return the receipt of an earlier attempt at the same task.

    Raises :class:`CheckpointError` naming tensor, input and index for non-finite values, for integers
    that differ, and for input bytes that do not match the digest in their manifest.
    """
    store = open_store(task.output_url)
    earlier = read_receipt(store, task)
    if earlier is not None:
        return earlier
    run = _TaskRun(task)
    shard = write_shard(
        store,
        task.shard_key,
        [(tensor.name, tensor.write_dtype, tensor.shape) for tensor in task.tensors],
        run.chunks_of,
        "model",
    )
    receipt = Receipt(
        task=task.number,
        identity=task_identity(task),
        shard=shard,
        input_digests=tuple(run.input_digests),
        bytes_read=task.bytes_read,
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )
    _write_receipt(store, receipt)
    return receipt


def read_receipt(store: Store, task: MergeTask) -> Receipt | None:
    """Receipt of an earlier attempt, if its task is this one and its shard is there in full."""
    data = store.read_if_present(receipt_key(task.number))
    if data is None:
        return None
    values = json.loads(data)
    if values["identity"] != task_identity(task):
        return None
    receipt = parse_record(Receipt, {**values, "bytes_read": 0, "reused": True})
    if not store.exists(receipt.shard.key) or store.size(receipt.shard.key) != receipt.shard.bytes:
        return None
    return receipt


def task_identity(task: MergeTask) -> str:
    """Fingerprint of what determines the shard's bytes and of where its inputs lie."""
    values: dict[str, Any] = dataclasses.asdict(task)
    del values["chunk_elements"], values["output_url"], values["parameter_groups"]
    return fingerprint(values)


def receipt_key(number: int) -> str:
    """Key of a task's receipt below the output folder."""
    return f"receipts/task-{number:05d}.json"


def _write_receipt(store: Store, receipt: Receipt) -> None:
    data = json.dumps(dataclasses.asdict(receipt)).encode()
    try:
        store.create(receipt_key(receipt.task), data)
    except ObjectExists:
        # Another attempt at the same task, or the receipt of an abandoned plan.
        store.put(receipt_key(receipt.task), data)


class _TaskRun:
    """Streams the tensors of one task and remembers the digests of what it read."""

    def __init__(self, task: MergeTask) -> None:
        self.task = task
        self.inputs = [open_store(url) for url in task.input_urls]
        self.input_digests: list[dict[str, str]] = [{} for _ in self.inputs]
        self._planned = {tensor.name: tensor for tensor in task.tensors}
        self._sums: dict[str, ChunkSum] = {}

    def chunks_of(self, entry: TensorEntry) -> Iterator[memoryview]:
        """Output bytes of one tensor, chunk by chunk."""
        tensor = self._planned[entry.name]
        hashers = [new_hasher() for _ in self.inputs]
        for start in range(0, tensor.num_elements, self.task.chunk_elements):
            end = min(start + self.task.chunk_elements, tensor.num_elements)
            pieces = self._read(tensor, start, end, hashers)
            merged = (
                self._mean(tensor, start, pieces)
                if tensor.read_dtype in FLOAT_DTYPES
                else _equal(tensor, start, pieces, self.inputs)
            )
            yield merged
        for index, hasher in enumerate(hashers):
            self._record_digest(tensor, index, str(hasher.hexdigest()))

    def _read(self, tensor: PlannedTensor, start: int, end: int, hashers: list[Any]) -> Iterator[bytes]:
        width = DTYPE_BYTES[tensor.read_dtype]
        for store, (key, offset), hasher in zip(self.inputs, tensor.sources, hashers, strict=True):
            data = store.read_range(key, offset + start * width, offset + end * width)
            hasher.update(data)
            yield data

    def _mean(self, tensor: PlannedTensor, start: int, pieces: Iterator[bytes]) -> memoryview:
        chunk = self._sums.setdefault(tensor.read_dtype, ChunkSum(self.task.chunk_elements, tensor.read_dtype))
        size = 0
        for index, (data, weight) in enumerate(zip(pieces, self.task.weights, strict=True)):
            chunk.add(data, weight, first=index == 0)
            size = len(data) // DTYPE_BYTES[tensor.read_dtype]
        stored = encode(chunk.result(size), tensor.write_dtype)
        bad = first_nonfinite(stored, tensor.write_dtype)
        if bad is not None:
            raise self._nonfinite(tensor, start, size, bad)
        return memoryview(stored.tobytes())

    def _nonfinite(self, tensor: PlannedTensor, start: int, size: int, bad: int) -> CheckpointError:
        """Find the culprit: a sum is finite only if every input is."""
        width = DTYPE_BYTES[tensor.read_dtype]
        for store, (key, offset) in zip(self.inputs, tensor.sources, strict=True):
            data = store.read_range(key, offset + start * width, offset + (start + size) * width)
            index = first_nonfinite_stored(data, tensor.read_dtype)
            if index is not None:
                return CheckpointError(
                    f"{store.url}/{key}: tensor {tensor.name!r} is not finite at element {start + index}"
                )
        return CheckpointError(
            f"the mean of tensor {tensor.name!r} overflows {tensor.write_dtype} at element {start + bad}; "
            "all inputs are finite: choose a wider --dtype"
        )

    def _record_digest(self, tensor: PlannedTensor, index: int, digest: str) -> None:
        promised = tensor.digests[index]
        if promised and promised != digest:
            raise CheckpointError(
                f"{self.inputs[index].url}/{tensor.sources[index][0]}: tensor {tensor.name!r} has digest {digest[:16]}, "
                f"its manifest says {promised[:16]}: the object was changed or damaged after it was committed"
            )
        self.input_digests[index][tensor.name] = digest


def _equal(tensor: PlannedTensor, start: int, pieces: Iterator[bytes], inputs: list[Store]) -> memoryview:
    first = next(pieces)
    for store, data in zip(inputs[1:], pieces, strict=True):
        if data != first:
            raise CheckpointError(
                f"integer tensor {tensor.name!r} differs between {inputs[0].url} and {store.url} near element {start}; "
                "integers are not averaged and must be equal"
            )
    return memoryview(first)
