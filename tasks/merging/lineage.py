"""What it takes to make a merged checkpoint again, as one value: kept wherever the checkpoint itself is not."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.errors import ObjectMissing
from configs.errors import UserError
from configs.typed import parse_record
from tasks.checkpoints.collected import open_collected
from tasks.checkpoints.content import digest_of_weights
from tasks.checkpoints.dooms import when
from tasks.checkpoints.manifest import Manifest, Merge, MergeInput
from tasks.checkpoints.reader import Checkpoint
from tasks.checkpoints.safetensors_header import CheckpointError
from tasks.checkpoints.tied import open_untied
from tasks.merging.methods import EVALUATED_METHODS, MethodChoice
from tasks.merging.plan import SHARD_BYTES, merge_identity, plan_merge
from tasks.merging.planned import MergePlan
from tasks.merging.policy import policy_of

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """A merged checkpoint without its bytes."""

    url: str
    """Where it was published."""
    digest: str
    """Its content digest."""
    state_digest: str | None
    """Digest of its training state; None without one."""
    step: int | None
    """Step of its newest input."""
    tokens_seen: int | None
    """Tokens seen up to that step."""
    merge: Merge
    """Inputs, method, weights, dtypes and policy. What a search tried is left out."""
    shard_bytes: int = SHARD_BYTES
    """Most bytes of an output shard; changes files, never the digest."""
    code_version: str = ""
    """pmaflow that made it."""
    created: float = 0.0
    """Unix seconds."""
    format_version: int = FORMAT_VERSION
    """Version of this record."""

    @property
    def count(self) -> int:
        """N."""
        return len(self.merge.inputs)

    @property
    def interval_tokens(self) -> int | None:
        """V: tokens between neighbouring inputs; None if they are not equally spaced, or nobody knows where they stand."""
        tokens = [item.tokens_seen for item in self.merge.inputs]
        known = [token for token in tokens if token is not None]
        gaps = {later - earlier for earlier, later in itertools.pairwise(known)}
        return gaps.pop() if len(gaps) == 1 and len(known) == len(tokens) else None


def lineage_of(url: str, manifest: Manifest, shard_bytes: int = SHARD_BYTES) -> Lineage:
    """Lineage of the merged checkpoint at ``url``."""
    assert manifest.merge is not None
    options = {key: value for key, value in manifest.merge.options.items() if key != "trace"}
    return Lineage(
        url=url,
        digest=manifest.digest,
        state_digest=manifest.state_digest,
        step=manifest.step,
        tokens_seen=manifest.tokens_seen,
        merge=dataclasses.replace(manifest.merge, options=options),
        shard_bytes=shard_bytes,
        code_version=manifest.code_version,
        created=manifest.created,
    )


def encode_lineage(lineage: Lineage) -> str:
    """``lineage`` as JSON."""
    return json.dumps(dataclasses.asdict(lineage), sort_keys=True, allow_nan=False)


def parse_lineage(text: str, where: str) -> Lineage:
    """Lineage from untrusted JSON; :class:`configs.errors.UserError` names ``where``."""
    try:
        values = json.loads(text)
        if values.get("format_version") != FORMAT_VERSION:
            raise TypeError(f"format_version {values.get('format_version')!r}; this version reads {FORMAT_VERSION}")
        return parse_record(Lineage, values)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: the record of the merge is damaged: {error}") from None


def plan_again(lineage: Lineage, output_url: str, where: str) -> MergePlan:
    """The plan that makes the checkpoint of ``lineage`` at ``output_url``, all its inputs found and proven unchanged.

    Inputs with a manifest are compared by the digests that it states (tensors are hashed while they are merged); plain
    folders whose files were touched since are read once to be sure. Raises :class:`configs.errors.UserError` that lists
    every input that is gone or was replaced, before anything is written.
    """
    merge = lineage.merge
    inputs = _open_inputs(lineage, where)
    policy = policy_of(merge.policies, where)
    if merge_identity(merge.weights, merge.dtypes, merge.policies, inputs) != merge.identity:
        _require_same(merge.inputs, inputs, where, needs_state=policy.moments != "reset")
    dtype = merge.dtypes.get("write")
    plan = plan_merge(
        inputs,
        _choice(merge),
        output_url=output_url,
        dtype=None if dtype == "as input" else dtype,
        policy=policy,
        shard_bytes=lineage.shard_bytes,
    )
    if plan.weights != merge.weights or plan.dtypes != merge.dtypes:
        raise UserError(
            f"{where}: this version of pmaflow merges by {merge.method} with weights {list(plan.weights)} and dtypes "
            f"{plan.dtypes}; {list(merge.weights)} and {merge.dtypes} are on record. Use pmaflow {lineage.code_version}"
        )
    return plan


def _choice(merge: Merge) -> MethodChoice:
    is_explicit = merge.method == "weights" or merge.method in EVALUATED_METHODS
    return MethodChoice(
        method=merge.method,
        alpha=merge.alpha,
        decay=tuple(merge.options["decay"]) if "decay" in merge.options else None,
        width=merge.options.get("width"),
        weights=merge.weights if is_explicit else None,
        allow_unnormalised=is_explicit,
    )


def _open_inputs(lineage: Lineage, where: str) -> list[Checkpoint]:
    opened, problems = [], []
    for item in lineage.merge.inputs:
        try:
            opened.append(open_untied(item.url))
        except (UserError, CheckpointError, ObjectMissing) as error:
            gone = open_collected(item.url)
            problems.append(
                f"  {item.url}: {str(error).removeprefix(f'{item.url}: ')}"
                if gone is None
                else f"  {item.url}: collected by retention on {when(gone[1].collected_at or gone[1].doomed_at)}"
            )
    # Of those that are there, whatever has a manifest is told apart at once.
    by_url = {checkpoint.url: checkpoint for checkpoint in opened}
    for item in lineage.merge.inputs:
        found = by_url.get(item.url)
        if found is not None and found.manifest is not None and found.manifest.digest != item.digest:
            problems.append(_replaced(item, found.manifest.digest))
    _require_none(problems, lineage.merge.inputs, where)
    return opened


def _require_same(
    recorded: Sequence[MergeInput], inputs: Sequence[Checkpoint], where: str, *, needs_state: bool
) -> None:
    """Find what differs of inputs whose identities do; those without a manifest are read."""
    problems = [
        _replaced(item, found)
        for item, checkpoint in zip(recorded, inputs, strict=True)
        if checkpoint.manifest is None and (found := digest_of_weights(checkpoint)) != item.digest
    ]
    if not problems and needs_state:
        problems = [
            f"  {item.url}: its manifest is not the one that was merged, and the training state was merged, too"
            for item, checkpoint in zip(recorded, inputs, strict=True)
            if checkpoint.manifest_digest != item.manifest_digest
        ]
    _require_none(problems, recorded, where)


def _require_none(problems: Sequence[str], recorded: Sequence[MergeInput], where: str) -> None:
    if problems:
        raise UserError(
            f"{where} cannot be made again: {len(problems)} of {len(recorded)} inputs are gone or were replaced since:\n"
            + "\n".join(problems)
            + "\nPut them back where they were (pma verify URL says what a checkpoint holds); nothing was written"
        )


def _replaced(item: MergeInput, found: str) -> str:
    return f"  {item.url}: holds content {found}, {item.digest} was merged: it was replaced since"
