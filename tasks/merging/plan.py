"""Plan merges from headers and manifests alone: which elements of which inputs make which output shard.

A plan is a frozen value that prints as JSON and is executed as it stands. All differences between
inputs are found here, before any tensor data is read. Several merges of one set of inputs share one
plan, so that the bytes are read once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from configs.errors import UserError
from tasks.checkpoints.digest import fingerprint
from tasks.checkpoints.groups import group_names
from tasks.checkpoints.reader import Checkpoint
from tasks.checkpoints.regions import TensorPlace
from tasks.checkpoints.safetensors_header import tensor_bytes
from tasks.merging.compare import require_alike, require_distinct, require_moments
from tasks.merging.kernel import FLOAT_DTYPES
from tasks.merging.methods import MethodChoice
from tasks.merging.packing import pack_groups
from tasks.merging.policy import DTYPE_NAMES, NEWEST, MergePolicy

Vector = tuple[float | None, ...]
"""A weight per input; None where an input is no part of the sum, which is not the same as a weight of zero."""
MOMENTS = ("exp_avg", "exp_avg_sq")
SHARD_BYTES = 1 << 30
USEFUL_SHARD_BYTES = 128 << 20
"""Below the limit of a shard, outputs are cut to about this, so that workers share a merge and a killed one resumes."""
MAX_USEFUL_SHARDS = 16
CHUNK_BYTES = 1 << 20
"""Read at a time from one input: sum, term and data stay in the second-level cache."""
REMOTE_CHUNK_BYTES = 8 << 20
"""The same where a read waits for a network."""
LEAST_CHUNK_BYTES = 8 << 10
REMOTE_BUFFERS = 6
"""Reads in flight, where a read waits for a network."""
WORKER_BASE_BYTES = 160 << 20
"""Allowance for a worker process before any chunk (measured: 45 MiB as a local process, 130 MiB as a Ray task)."""
SUM_BYTES_PER_CHUNK_BYTE = 8
"""Buffers of one merge, for the narrowest dtype: a float32 sum, the rounded output and terms, per byte of bfloat16 read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTensor:
    """One tensor of the output and where its inputs lie."""

    name: str
    """Disk name, the same in every input."""
    sources: tuple[TensorPlace, ...]
    """Where each input holds it, oldest first."""
    read_as: str | None
    """Dtype that inputs are rounded or widened to before they are added; None: as stored."""
    accumulate: str
    """``F32`` or ``F64``; empty for tensors that are compared, not averaged."""
    write_dtype: str
    """Dtype of the output."""
    vector: int
    """Which of an output's weight vectors holds."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Global shape."""
        return self.sources[0].shape

    @property
    def num_elements(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.shape)

    @property
    def read_bytes(self) -> int:
        """Bytes of all inputs."""
        return sum(place.num_bytes for place in self.sources)

    @property
    def write_bytes(self) -> int:
        """Bytes written for one merge."""
        return tensor_bytes(self.write_dtype, self.shape)


@dataclass(frozen=True, kw_only=True)
class TaskOutput:
    """One merge that a task works for."""

    url: str
    """Folder of the merged checkpoint."""
    vectors: tuple[Vector, ...]
    """Weight vectors that the tensors refer to."""
    identity: str
    """Identity of the merge, so that a receipt of other inputs at the same places is not taken for this one's."""


@dataclass(frozen=True, kw_only=True)
class MergeTask:
    """One output shard of every merge of the plan: everything a worker needs, as names and numbers."""

    number: int
    """From 1 over the whole plan."""
    part: Literal["model", "state"]
    """Whether the shard holds weights or training state."""
    place: tuple[int, int]
    """Which shard of how many of its part, from 1."""
    outputs: tuple[TaskOutput, ...]
    """The merges."""
    input_urls: tuple[str, ...]
    """Folders that the inputs' tensors lie in, oldest first."""
    tensors: tuple[PlannedTensor, ...]
    """In file order."""
    chunk_bytes: int = CHUNK_BYTES
    """Bytes read at a time from one input; does not change the result."""
    buffers: int = 1
    """Reads in flight; does not change the result."""

    @property
    def shard_key(self) -> str:
        """Key of the output shard."""
        return f"{self.part}-{self.place[0]:05d}-of-{self.place[1]:05d}.safetensors"

    @property
    def parameter_groups(self) -> tuple[str, ...]:
        """Groups that the shard holds, wholly or in part."""
        return tuple(group_names(tensor.name for tensor in self.tensors))

    @property
    def bytes_read(self) -> int:
        """Bytes read over all inputs that some merge uses."""
        return sum(
            place.num_bytes
            for tensor in self.tensors
            for index, place in enumerate(tensor.sources)
            if self.reads(tensor, index)
        )

    def reads(self, tensor: PlannedTensor, index: int) -> bool:
        """Whether input ``index`` is part of some sum, or a weight that must be hashed because no manifest states its digest."""
        if self.part == "model" and not tensor.sources[index].digest:
            return True
        return any(output.vectors[tensor.vector][index] is not None for output in self.outputs)

    @property
    def bytes_written(self) -> int:
        """Tensor bytes written over all merges."""
        return len(self.outputs) * sum(tensor.write_bytes for tensor in self.tensors)

    @property
    def memory_bytes(self) -> int:
        """Most memory the worker needs; depends on chunk, reads in flight and number of merges, not on N or the model."""
        return WORKER_BASE_BYTES + self.chunk_bytes * (self.buffers + SUM_BYTES_PER_CHUNK_BYTE * len(self.outputs))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One merge that is asked for."""

    output_url: str
    """Folder of the merged checkpoint."""
    choice: MethodChoice
    """Method and parameters."""
    count: int | None = None
    """How many of the newest inputs it takes; None means all."""


@dataclass(frozen=True, kw_only=True)
class MergePlan:
    """A whole merge; several of one set of inputs share their tasks."""

    output_url: str
    """Folder of the merged checkpoint."""
    inputs: tuple[Checkpoint, ...]
    """Of this merge, oldest first."""
    choice: MethodChoice
    """Method and parameters."""
    weights: tuple[float, ...]
    """One per input."""
    dtypes: dict[str, str]
    """Read, accumulate and write rules, for the manifest."""
    policy: MergePolicy
    """What becomes of each tensor."""
    tasks: tuple[MergeTask, ...] = field(repr=False)
    """One per output shard."""
    number: int = 0
    """Which output of the tasks this merge is."""
    first_input: int = 0
    """Which input of the tasks is this merge's oldest."""
    identity: str
    """Fingerprint of inputs, weights, dtypes and policy: what determines the bytes."""

    @property
    def method(self) -> str:
        """Merge method."""
        return self.choice.method

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
    choice: MethodChoice,
    *,
    output_url: str,
    dtype: str | None = None,
    policy: MergePolicy | None = None,
    shard_bytes: int = SHARD_BYTES,
    buffer_bytes: int | None = None,
) -> MergePlan:
    """Plan one merge of ``inputs``; as :func:`plan_merges`."""
    recipe = Recipe(output_url=output_url, choice=choice)
    return plan_merges(
        inputs, [recipe], dtype=dtype, policy=policy, shard_bytes=shard_bytes, buffer_bytes=buffer_bytes
    )[0]


def plan_merges(
    inputs: Sequence[Checkpoint],
    recipes: Sequence[Recipe],
    *,
    dtype: str | None = None,
    policy: MergePolicy | None = None,
    shard_bytes: int = SHARD_BYTES,
    buffer_bytes: int | None = None,
) -> list[MergePlan]:
    """Plan the merges that ``recipes`` ask for, from one pass over ``inputs`` (oldest first).

    ``dtype`` (such as ``bfloat16``) overrides the inputs' own for the output. ``buffer_bytes`` bounds what one worker's
    buffers take; it changes the chunk size, never the result. Raises :class:`configs.errors.UserError` listing every difference of names, shapes and dtypes between the inputs.
    """
    policy = policy or MergePolicy()
    require_distinct(inputs)
    require_alike(inputs, policy)
    dtypes = {"read": "stored", "accumulate": "float32 (float64 for float64)", "write": dtype or "as input"}
    drafts = [_draft(recipe, number, inputs, dtypes, policy) for number, recipe in enumerate(recipes)]
    outputs = tuple(TaskOutput(url=d.output_url, vectors=_vectors(d, len(inputs)), identity=d.identity) for d in drafts)
    remote = any(item.store.reads_ahead for item in inputs)
    buffers = REMOTE_BUFFERS if remote else 1
    chunk = chunk_bytes(buffer_bytes, REMOTE_CHUNK_BYTES if remote else CHUNK_BYTES, buffers, len(recipes))
    shards = _shards(inputs, policy, dtype, shard_bytes)
    tasks = tuple(
        MergeTask(
            number=number,
            part=part,
            place=place,
            outputs=outputs,
            input_urls=tuple(item.store.url for item in inputs),
            tensors=tensors,
            chunk_bytes=chunk,
            buffers=buffers,
        )
        for number, (part, place, tensors) in enumerate(shards, start=1)
    )
    return [dataclasses.replace(draft, tasks=tasks) for draft in drafts]


def chunk_bytes(buffer_bytes: int | None, usual: int, buffers: int, num_outputs: int) -> int:
    """Bytes of a chunk whose buffers fit ``buffer_bytes``, at most ``usual``; more would leave the cache."""
    if buffer_bytes is None:
        return usual
    per_byte = buffers + SUM_BYTES_PER_CHUNK_BYTE * num_outputs
    if buffer_bytes < LEAST_CHUNK_BYTES * per_byte:
        raise UserError(
            f"a memory budget of {buffer_bytes} bytes is too small: a worker's buffers need at least {LEAST_CHUNK_BYTES * per_byte}"
        )
    return min(usual, buffer_bytes // per_byte // 64 * 64)


def merge_identity(
    weights: Sequence[float], dtypes: Mapping[str, str], policy: Mapping[str, Any], inputs: Sequence[Checkpoint]
) -> str:
    """Fingerprint of what determines a merge's bytes: its inputs as they are now, weights, dtypes and policy."""
    return fingerprint(
        {
            "inputs": [_input_identity(item, with_state=policy["optimizer_moments"] != "reset") for item in inputs],
            "weights": list(weights),
            "dtypes": dict(dtypes),
            "policy": dict(policy),
        }
    )


def _draft(
    recipe: Recipe, number: int, inputs: Sequence[Checkpoint], dtypes: dict[str, str], policy: MergePolicy
) -> MergePlan:
    count = len(inputs) if recipe.count is None else recipe.count
    if not 0 < count <= len(inputs):
        raise UserError(f"a merge of {count} inputs was asked for; {len(inputs)} are given")
    chosen = tuple(inputs[len(inputs) - count :])
    weights = recipe.choice.build(positions_of(chosen))
    if policy.moments == "merge" and min(weights) < 0:
        raise UserError(
            f"moments: merge needs weights of at least 0, method {recipe.choice.method} gives {min(weights):.3g}: "
            "a second moment would turn negative; use moments: newest or reset"
        )
    return MergePlan(
        output_url=recipe.output_url,
        inputs=chosen,
        choice=recipe.choice,
        weights=weights,
        dtypes=dtypes,
        policy=policy,
        tasks=(),
        number=number,
        first_input=len(inputs) - count,
        identity=merge_identity(weights, dtypes, policy.describe(), chosen),
    )


def positions_of(inputs: Sequence[Checkpoint]) -> list[int | None]:
    """Tokens seen of each input; None for plain folders."""
    return [item.manifest.tokens_seen if item.manifest else None for item in inputs]


def _vectors(draft: MergePlan, num_inputs: int) -> tuple[Vector, ...]:
    """Weight vectors over all inputs of the plan: the merge's own, ``newest``, then one per policy rule."""
    before: Vector = (None,) * draft.first_input
    newest: Vector = (*(None,) * (num_inputs - 1), 1.0)
    vectors: list[Vector] = [(*before, *draft.weights), newest]
    for rule in draft.policy.rules:
        if rule.method is None:
            vectors.append(vectors[0])
        elif rule.method == NEWEST:
            vectors.append(newest)
        else:
            choice = MethodChoice(method=rule.method, alpha=rule.alpha, weights=rule.weights)
            vectors.append((*before, *choice.build(positions_of(draft.inputs))))
    return tuple(vectors)


def _shards(
    inputs: Sequence[Checkpoint], policy: MergePolicy, dtype: str | None, shard_bytes: int
) -> list[tuple[Literal["model", "state"], tuple[int, int], tuple[PlannedTensor, ...]]]:
    names = sorted(inputs[0].model, key=lambda name: _file_order(inputs[0].model[name], name))
    model = {name: _plan_tensor(name, [item.model[name] for item in inputs], policy, dtype) for name in names}
    most_files = max(item.num_files for item in inputs)
    shards: list[tuple[Literal["model", "state"], tuple[int, int], tuple[PlannedTensor, ...]]] = []
    parts: list[tuple[Literal["model", "state"], dict[str, PlannedTensor]]] = [("model", model)]
    if policy.moments != "reset":
        parts.append(("state", _plan_moments(inputs, names, policy)))
    for part, tensors in parts:
        sizes = {name: tensor.write_bytes for name, tensor in tensors.items()}
        bins = pack_groups(
            sizes, shard_bytes=shard_bytes, min_bins=max(most_files, _useful_shards(sum(sizes.values())))
        )
        for number, chosen in enumerate(bins, start=1):
            shards.append((part, (number, len(bins)), tuple(tensors[name] for name in chosen)))
    return shards


def _useful_shards(total_bytes: int) -> int:
    """A power of two, so that two, four or eight workers end together."""
    wanted = -(-total_bytes // USEFUL_SHARD_BYTES)
    return int(min(MAX_USEFUL_SHARDS, 1 << max(0, wanted - 1).bit_length()))


def _file_order(place: TensorPlace, name: str) -> tuple[str, int, str]:
    """Tensors that lie beside each other in the oldest input stay so, and are read together."""
    region = place.regions[0]
    return (region.key, region.offset, name) if len(place.regions) == 1 else ("", 0, name)


def _plan_tensor(name: str, places: Sequence[TensorPlace], policy: MergePolicy, dtype: str | None) -> PlannedTensor:
    stored = places[0].dtype
    rule = policy.rule_for(name)
    vector = 0 if rule is None else 2 + policy.rules.index(rule)
    if stored not in FLOAT_DTYPES:
        newest = policy.integers == NEWEST or policy.takes_newest(name)
        return _planned(name, places, write_dtype=stored, accumulate="", vector=1 if newest else vector)
    read_as = DTYPE_NAMES[rule.read] if rule is not None and rule.read else None
    write = read_as or stored
    if dtype is not None and not policy.keeps_dtype(name):
        write = DTYPE_NAMES[dtype]
    if rule is not None and rule.write:
        write = DTYPE_NAMES[rule.write]
    wide = "F64" in {read_as, *(place.dtype for place in places)}
    accumulate = DTYPE_NAMES[rule.accumulate] if rule is not None and rule.accumulate else ("F64" if wide else "F32")
    if policy.takes_newest(name) and (rule is None or rule.method is None):
        vector = 1
    return _planned(name, places, write_dtype=write, accumulate=accumulate, vector=vector, read_as=read_as)


def _planned(
    name: str,
    places: Sequence[TensorPlace],
    *,
    write_dtype: str,
    accumulate: str,
    vector: int,
    read_as: str | None = None,
) -> PlannedTensor:
    return PlannedTensor(
        name=name,
        sources=tuple(places),
        read_as=read_as,
        accumulate=accumulate,
        write_dtype=write_dtype,
        vector=vector,
    )


def _plan_moments(inputs: Sequence[Checkpoint], names: Sequence[str], policy: MergePolicy) -> dict[str, PlannedTensor]:
    floats = [name for name in names if inputs[0].model[name].dtype in FLOAT_DTYPES]
    wanted = [f"{moment}.{name}" for moment in MOMENTS for name in floats if f"{moment}.{name}" in inputs[-1].state]
    if not wanted:
        wanted = [f"{moment}.{name}" for moment in MOMENTS for name in floats]
    holders = inputs[-1:] if policy.moments == NEWEST else inputs
    require_moments(holders, floats, wanted=wanted)
    planned = {}
    for name in wanted:
        places = [item.state.get(name, inputs[-1].state[name]) for item in inputs]
        weight = _plan_tensor(name.split(".", 1)[1], places, policy, None)
        vector = 1 if policy.moments == NEWEST else weight.vector
        planned[name] = _planned(
            name, places, write_dtype=places[-1].dtype, accumulate=weight.accumulate, vector=vector
        )
    return planned


def _input_identity(checkpoint: Checkpoint, *, with_state: bool) -> dict[str, Any]:
    manifest = checkpoint.manifest
    if manifest is not None:
        return {"digest": manifest.digest, "state": manifest.state_digest if with_state else None}
    places = [*checkpoint.model.values(), *(checkpoint.state.values() if with_state else ())]
    keys = sorted({region.key for place in places for region in place.regions})
    return {"url": checkpoint.store.url, "versions": [[key, checkpoint.store.version(key)] for key in keys]}
