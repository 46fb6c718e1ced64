"""Publish a merge: census, lineage, small files, and the manifest last, under the lease."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

from cluster.storage import open_store
from tasks.checkpoints.digest import content_digest
from tasks.checkpoints.groups import group_names
from tasks.checkpoints.manifest import (
    STATE_KEY,
    Manifest,
    Merge,
    MergeInput,
    model_digest,
    state_digest,
)
from tasks.checkpoints.reader import Checkpoint
from tasks.checkpoints.run_folder import code_version
from tasks.checkpoints.safetensors_header import CheckpointError, TensorEntry
from tasks.checkpoints.writer import commit_manifest, write_side_files
from tasks.merging.planned import MergePlan
from tasks.merging.receipt import Receipt

COPIED_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
    "workload.json",
)  # fmt: skip


def publish(plan: MergePlan, receipts: Sequence[Receipt], check_lease: Callable[[], None]) -> Manifest:
    """Commit the merge of ``plan`` from the receipts of all of its tasks; returns the manifest that stands.

    Raises :class:`CheckpointError` if a tensor is missing or too many, and whatever ``check_lease`` raises.
    """
    store = open_store(plan.output_url)
    shards = tuple(receipt.shard for receipt in receipts)
    names = sorted(tensor.name for shard in shards if shard.part == "model" for tensor in shard.tensors)
    _require_census(plan, names)
    newest = plan.inputs[-1].manifest
    scalars = _state_scalars(plan) if any(shard.part == "state" for shard in shards) else None
    side_files = _copied_files(plan)
    if scalars is not None:
        side_files[STATE_KEY] = json.dumps(scalars, indent=1).encode()
    manifest = Manifest(
        kind="merged",
        step=newest.step if newest else None,
        tokens_seen=newest.tokens_seen if newest else None,
        digest=model_digest(shards),
        state_digest=None if scalars is None else state_digest(shards, scalars),
        shards=shards,
        files=write_side_files(store, side_files, shards, check_lease),
        parameter_groups=group_names(names),
        phase=newest.phase if newest else None,
        learning_rate=newest.learning_rate if newest else None,
        run_id=newest.run_id if newest else None,
        recovery=newest.recovery if newest else 0,
        merge=Merge(
            method=plan.choice.method,
            alpha=plan.choice.alpha,
            inputs=tuple(_describe_input(plan, receipts, index) for index in range(len(plan.inputs))),
            weights=plan.weights,
            dtypes=plan.dtypes,
            policies=plan.policy.describe(),
            identity=plan.identity,
            options=plan.choice.options,
        ),
        code_version=code_version(),
        created=time.time(),
    )
    return commit_manifest(store, manifest, check_lease)


def _state_scalars(plan: MergePlan) -> dict[str, Any]:
    """Step counters, data position and random state: the newest input's, whatever became of the moments."""
    data = plan.inputs[-1].store.read_if_present(STATE_KEY)
    return {} if data is None else dict(json.loads(data))


def _require_census(plan: MergePlan, written: list[str]) -> None:
    expected = sorted(plan.inputs[0].model)
    if written != expected:
        raise CheckpointError(
            f"{plan.output_url}: wrote {len(written)} tensors, the inputs hold {len(expected)}; nothing was published"
        )


def _describe_input(plan: MergePlan, receipts: Sequence[Receipt], index: int) -> MergeInput:
    checkpoint = plan.inputs[index]
    manifest = checkpoint.manifest
    return MergeInput(
        url=checkpoint.url,
        digest=manifest.digest if manifest else _streamed_digest(checkpoint, receipts, plan.first_input + index),
        manifest_digest=checkpoint.manifest_digest,
        step=manifest.step if manifest else None,
        tokens_seen=manifest.tokens_seen if manifest else None,
    )


def _streamed_digest(checkpoint: Checkpoint, receipts: Sequence[Receipt], index: int) -> str:
    digests: dict[str, str] = {}
    for receipt in receipts:
        if receipt.shard.part == "model":
            digests |= receipt.input_digests[index]
    return content_digest(
        TensorEntry(
            name=name, dtype=place.dtype, shape=place.shape, offset=0, bytes=place.num_bytes, digest=digests[name]
        )
        for name, place in checkpoint.model.items()
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
