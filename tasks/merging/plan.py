"""Plan a merge from headers and manifests alone: which bytes of which inputs make which output shard.

A plan is a frozen value that prints as JSON and is executed as it stands. All differences between
inputs are found here, before any tensor data is read.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from configs.errors import UserError
from tasks.checkpoints.digest import fingerprint
from tasks.checkpoints.groups import group_names
from tasks.checkpoints.manifest import Merge
from tasks.checkpoints.reader import Checkpoint, TensorPlace
from tasks.checkpoints.safetensors_header import tensor_bytes
from tasks.merging.kernel import FLOAT_DTYPES

DTYPE_NAMES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}
KEEP_DTYPE_PATTERNS = ("*e_score_correction_bias",)
"""Tensors whose dtype an override never touches: router correction biases decide by tiny differences."""
EQUAL_DTYPES = ("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")
CHUNK_ELEMENTS = 1 << 18
"""Elements of one chunk: 1 MiB in float32, so that sum, term and data stay in cache."""
WORKER_BASE_BYTES = 160 << 20
"""Allowance for a worker process before any chunk (measured: 45 MiB as a local process, 130 MiB as a Ray task)."""
BUFFER_BYTES_PER_ELEMENT = 32
"""Buffers of one chunk, for the widest dtype: data as read, term, sum and rounded output, 8 bytes each."""
LEAST_CHUNK_ELEMENTS = 1 << 12
MAX_DIFFERENCES = 50


@dataclass(frozen=True, kw_only=True)
class PlannedTensor:
    """One tensor of the output and where its inputs lie."""

    name: str
    """Disk name, the same in every input."""
    shape: tuple[int, ...]
    """Global shape."""
    read_dtype: str
    """Stored dtype, the same in every input."""
    write_dtype: str
    """Dtype of the output."""
    sources: tuple[tuple[str, int], ...]
    """Object key and byte offset in each input, oldest first."""
    digests: tuple[str, ...]
    """Tensor digest that each input's manifest promises; empty text where there is none."""

    @property
    def num_elements(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.shape)

    @property
    def read_bytes(self) -> int:
        """Bytes read from one input."""
        return tensor_bytes(self.read_dtype, self.shape)

    @property
    def write_bytes(self) -> int:
        """Bytes written."""
        return tensor_bytes(self.write_dtype, self.shape)


@dataclass(frozen=True, kw_only=True)
class MergeTask:
    """One output shard: everything a worker needs, as names and numbers."""

    number: int
    """From 1."""
    num_tasks: int
    """Tasks of the plan."""
    output_url: str
    """Folder of the merged checkpoint."""
    input_urls: tuple[str, ...]
    """Oldest first."""
    weights: tuple[float, ...]
    """One per input."""
    tensors: tuple[PlannedTensor, ...]
    """In file order."""
    parameter_groups: tuple[str, ...]
    """Groups that the shard holds, wholly or in part."""
    plan_identity: str
    """Identity of the plan, so that a receipt of other inputs at the same places is not taken for this one's."""
    chunk_elements: int = CHUNK_ELEMENTS
    """Elements per chunk; does not change the result."""

    @property
    def shard_key(self) -> str:
        """Key of the output shard."""
        return f"model-{self.number:05d}-of-{self.num_tasks:05d}.safetensors"

    @property
    def bytes_read(self) -> int:
        """Bytes read over all inputs."""
        return len(self.input_urls) * sum(tensor.read_bytes for tensor in self.tensors)

    @property
    def bytes_written(self) -> int:
        """Tensor bytes written."""
        return sum(tensor.write_bytes for tensor in self.tensors)

    @property
    def memory_bytes(self) -> int:
        """Most memory the worker needs; depends on the chunk, not on N or the model."""
        return WORKER_BASE_BYTES + BUFFER_BYTES_PER_ELEMENT * self.chunk_elements


@dataclass(frozen=True, kw_only=True)
class MergePlan:
    """A whole merge."""

    output_url: str
    """Folder of the merged checkpoint."""
    inputs: tuple[Checkpoint, ...]
    """Oldest first."""
    method: str
    """Merge method."""
    alpha: float | None
    """For ``ema``."""
    weights: tuple[float, ...]
    """One per input."""
    dtypes: dict[str, str]
    """Read, accumulate and write rules, for the manifest."""
    tasks: tuple[MergeTask, ...]
    """One per output shard."""
    identity: str
    """Fingerprint of inputs, weights and dtypes: what determines the bytes."""

    def rows(self) -> list[dict[str, Any]]:
        """The plan as the command line's JSON has it."""
        return [
            {
                "task": task.number,
                "parameter_groups": list(task.parameter_groups),
                "bytes_read": task.bytes_read,
                "bytes_written": task.bytes_written,
                "memory_bytes": task.memory_bytes,
            }
            for task in self.tasks
        ]


def plan_merge(
    inputs: Sequence[Checkpoint],
    weights: Sequence[float],
    *,
    output_url: str,
    method: str,
    alpha: float | None = None,
    dtype: str | None = None,
    shard_bytes: int = 1 << 30,
    buffer_bytes: int | None = None,
) -> MergePlan:
    """Plan the weighted mean of ``inputs``; ``dtype`` (such as ``bfloat16``) overrides the inputs' own for the output.

    ``buffer_bytes`` bounds what one worker's buffers take; it changes the chunk size, never the result. Raises :class:`configs.errors.UserError` listing every difference of names, shapes and dtypes between the inputs.
    """
    require_distinct(inputs)
    _require_alike(inputs)
    tensors = {name: _plan_tensor(name, inputs, dtype) for name in sorted(inputs[0].model)}
    bins = pack_groups(tensors, shard_bytes=shard_bytes, min_bins=max(item.num_files for item in inputs))
    dtypes = {"read": "stored", "accumulate": "float32 (float64 for float64)", "write": dtype or "as input"}
    identity = _identity(inputs, weights, dtypes)
    tasks = tuple(
        MergeTask(
            number=number,
            num_tasks=len(bins),
            output_url=output_url,
            input_urls=tuple(item.url for item in inputs),
            weights=tuple(weights),
            tensors=tuple(tensors[name] for name in names),
            parameter_groups=tuple(group_names(names)),
            plan_identity=identity,
            chunk_elements=chunk_elements(buffer_bytes),
        )
        for number, names in enumerate(bins, start=1)
    )
    return MergePlan(
        output_url=output_url,
        inputs=tuple(inputs),
        method=method,
        alpha=alpha,
        weights=tuple(weights),
        dtypes=dtypes,
        tasks=tasks,
        identity=identity,
    )


def pack_groups(tensors: Mapping[str, PlannedTensor], *, shard_bytes: int, min_bins: int) -> list[list[str]]:
    """Pack tensors into output shards: whole parameter groups, largest first, to the least-loaded shard.

    Groups above ``shard_bytes`` are cut between tensors. The number of shards is the smallest that keeps
    each under ``shard_bytes`` (a single larger tensor excepted), and at least ``min_bins`` where there
    are enough groups.
    """
    units = [unit for names in group_names(tensors).values() for unit in _cut(names, tensors, shard_bytes)]
    sizes = [sum(tensors[name].write_bytes for name in unit) for unit in units]
    num_bins = max(1, min(len(units), max(min_bins, -(-sum(sizes) // shard_bytes))))
    order = sorted(range(len(units)), key=lambda i: (-sizes[i], units[i][0]))
    while True:
        bins: list[list[str]] = [[] for _ in range(num_bins)]
        loads = [0] * num_bins
        counts = [0] * num_bins
        for index in order:
            lightest = loads.index(min(loads))
            bins[lightest] += units[index]
            loads[lightest] += sizes[index]
            counts[lightest] += 1
        fits = all(load <= shard_bytes or counts[i] == 1 for i, load in enumerate(loads))
        if fits or num_bins >= len(units):
            return [sorted(names) for names in bins]
        num_bins += 1


def chunk_elements(buffer_bytes: int | None) -> int:
    """Elements of a chunk whose buffers fit ``buffer_bytes``, at most :data:`CHUNK_ELEMENTS`; more would leave the cache."""
    if buffer_bytes is None:
        return CHUNK_ELEMENTS
    least = LEAST_CHUNK_ELEMENTS * BUFFER_BYTES_PER_ELEMENT
    if buffer_bytes < least:
        raise UserError(
            f"a memory budget of {buffer_bytes} bytes is too small: a worker's buffers need at least {least}"
        )
    return min(CHUNK_ELEMENTS, buffer_bytes // BUFFER_BYTES_PER_ELEMENT)


def require_distinct(inputs: Sequence[Checkpoint]) -> None:
    """Refuse an empty list and the same input twice."""
    if not inputs:
        raise UserError("a merge needs at least one input")
    urls = [item.url for item in inputs]
    twice = sorted({url for url in urls if urls.count(url) > 1})
    if twice:
        raise UserError(f"the same input is given twice: {', '.join(twice)}")


def _require_alike(inputs: Sequence[Checkpoint]) -> None:
    first, problems = inputs[0], []
    for other in inputs[1:]:
        for name in sorted(first.model.keys() | other.model.keys()):
            problems += _differences(name, first, other)
    problems += [
        f"{name}: dtype {place.entry.dtype} cannot be merged"
        for name, place in first.model.items()
        if place.entry.dtype not in (*FLOAT_DTYPES, *EQUAL_DTYPES)
    ]
    if problems:
        shown = "\n  ".join(problems[:MAX_DIFFERENCES])
        more = f"\n  and {len(problems) - MAX_DIFFERENCES} more" if len(problems) > MAX_DIFFERENCES else ""
        raise UserError(f"the inputs do not hold the same tensors ({len(problems)} differences):\n  {shown}{more}")


def _differences(name: str, first: Checkpoint, other: Checkpoint) -> list[str]:
    if name not in other.model:
        return [f"{name}: missing from {other.url} (present in {first.url})"]
    if name not in first.model:
        return [f"{name}: missing from {first.url} (present in {other.url})"]
    a, b = first.model[name].entry, other.model[name].entry
    problems = []
    if a.shape != b.shape:
        problems.append(f"{name}: shape {list(a.shape)} in {first.url}, {list(b.shape)} in {other.url}")
    if a.dtype != b.dtype:
        problems.append(f"{name}: dtype {a.dtype} in {first.url}, {b.dtype} in {other.url}")
    return problems


def _plan_tensor(name: str, inputs: Sequence[Checkpoint], dtype: str | None) -> PlannedTensor:
    places: list[TensorPlace] = [item.model[name] for item in inputs]
    entry = places[0].entry
    keep = entry.dtype not in FLOAT_DTYPES or any(fnmatch.fnmatch(name, pattern) for pattern in KEEP_DTYPE_PATTERNS)
    return PlannedTensor(
        name=name,
        shape=entry.shape,
        read_dtype=entry.dtype,
        write_dtype=entry.dtype if keep or dtype is None else DTYPE_NAMES[dtype],
        sources=tuple((place.key, place.entry.offset) for place in places),
        digests=tuple(place.entry.digest for place in places),
    )


def _cut(names: Sequence[str], tensors: Mapping[str, PlannedTensor], shard_bytes: int) -> list[list[str]]:
    units: list[list[str]] = []
    load = 0
    for name in sorted(names):
        size = tensors[name].write_bytes
        if not units or load + size > shard_bytes:
            units.append([])
            load = 0
        units[-1].append(name)
        load += size
    return units


def merge_identity(merge: Merge, inputs: Sequence[Checkpoint]) -> str:
    """What :func:`plan_merge` would give a merge with the weights and dtypes of ``merge`` from ``inputs`` as they are now."""
    return _identity(inputs, merge.weights, merge.dtypes)


def _identity(inputs: Sequence[Checkpoint], weights: Sequence[float], dtypes: Mapping[str, str]) -> str:
    return fingerprint(
        {"inputs": [_input_identity(item) for item in inputs], "weights": list(weights), "dtypes": dict(dtypes)}
    )


def _input_identity(checkpoint: Checkpoint) -> dict[str, Any]:
    if checkpoint.manifest is not None:
        return {"digest": checkpoint.manifest.digest}
    keys = sorted({place.key for place in checkpoint.model.values()})
    return {"url": checkpoint.url, "versions": [[key, checkpoint.store.version(key)] for key in keys]}
