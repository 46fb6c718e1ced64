"""Plan merges from headers and manifests alone: which elements of which inputs make which output shard.

All differences between inputs are found here, before any tensor data is read. Several merges of one set of inputs share
one plan, so that the bytes are read once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from configs.errors import UserError
from tasks.checkpoints.digest import fingerprint
from tasks.checkpoints.reader import Checkpoint
from tasks.checkpoints.regions import TensorPlace
from tasks.merging.compare import require_alike, require_distinct, require_moments
from tasks.merging.kernel import FLOAT_DTYPES
from tasks.merging.methods import MethodChoice
from tasks.merging.packing import pack_groups
from tasks.merging.planned import (
    CHUNK_BYTES,
    SUM_BYTES_PER_CHUNK_BYTE,
    MergePlan,
    MergeTask,
    PlannedTensor,
    TaskOutput,
    Vector,
)
from tasks.merging.policy import DTYPE_NAMES, NEWEST, MergePolicy

MOMENTS = ("exp_avg", "exp_avg_sq")
SHARD_BYTES = 1 << 30
USEFUL_SHARD_BYTES = 128 << 20
"""Below the limit of a shard, outputs are cut to about this, so that workers share a merge and a killed one resumes."""
MAX_USEFUL_SHARDS = 16
REMOTE_CHUNK_BYTES = 8 << 20
"""A chunk where a read waits for a network."""
LEAST_CHUNK_BYTES = 8 << 10
REMOTE_BUFFERS = 6
"""Reads in flight, where a read waits for a network."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One merge that is asked for."""

    output_url: str
    """Folder of the merged checkpoint."""
    choice: MethodChoice
    """Method and parameters."""
    count: int | None = None
    """How many of the newest inputs it takes; None means all."""


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
