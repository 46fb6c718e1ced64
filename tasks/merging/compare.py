"""Compare what the inputs of a merge hold, from headers alone, and list every difference at once."""

from __future__ import annotations

from collections.abc import Sequence

from configs.errors import UserError
from tasks.checkpoints.reader import Checkpoint
from tasks.checkpoints.regions import TensorPlace
from tasks.merging.kernel import FLOAT_DTYPES
from tasks.merging.policy import MergePolicy

EQUAL_DTYPES = ("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")
"""Dtypes that are compared, never averaged."""
MAX_DIFFERENCES = 50


def require_distinct(inputs: Sequence[Checkpoint]) -> None:
    """Refuse an empty list, the same input twice, equal snapshots under two URLs, and an earlier merge beside its own inputs."""
    if not inputs:
        raise UserError("a merge needs at least one input")
    urls = [item.url for item in inputs]
    twice = sorted({url for url in urls if urls.count(url) > 1})
    if twice:
        raise UserError(f"the same input is given twice: {', '.join(twice)}")
    seen: dict[str, str] = {}
    for item in inputs:
        if item.manifest is None:
            continue
        if item.manifest.digest in seen:
            raise UserError(
                f"{seen[item.manifest.digest]} and {item.url} hold the same weights: one of them would count twice"
            )
        seen[item.manifest.digest] = item.url
    for item in inputs:
        earlier = item.manifest.merge.inputs if item.manifest is not None and item.manifest.merge is not None else ()
        others = {digest for digest, url in seen.items() if url != item.url}
        inside = [other.url for other in earlier if other.url in urls or other.digest in others]
        if inside:
            raise UserError(f"{item.url} is a merge that holds {inside[0]} already: leave one of them out")


def require_alike(inputs: Sequence[Checkpoint], policy: MergePolicy) -> None:
    """Refuse inputs whose tensors differ in name, shape or dtype, and dtypes that cannot be merged.

    Raises :class:`configs.errors.UserError` listing up to :data:`MAX_DIFFERENCES` of all differences. A policy rule
    with ``read`` lifts the demand of equal dtypes from the floating-point tensors it matches.
    """
    first, problems = inputs[0], []
    for other in inputs[1:]:
        problems += _differences(first, other, policy)
    problems += [
        f"{name}: dtype {place.dtype} cannot be merged"
        for name, place in first.model.items()
        if place.dtype not in (*FLOAT_DTYPES, *EQUAL_DTYPES)
    ]
    if problems:
        shown = "\n  ".join(problems[:MAX_DIFFERENCES])
        more = f"\n  and {len(problems) - MAX_DIFFERENCES} more" if len(problems) > MAX_DIFFERENCES else ""
        raise UserError(f"the inputs do not hold the same tensors ({len(problems)} differences):\n  {shown}{more}")


def require_moments(inputs: Sequence[Checkpoint], names: Sequence[str], *, wanted: Sequence[str]) -> None:
    """Refuse a policy for optimizer moments that ``inputs`` do not hold in the shapes of their weights.

    ``names`` are tensors of the model, ``wanted`` those of the state, such as ``exp_avg.<name>``.
    """
    problems = []
    for checkpoint in inputs:
        missing = [name for name in wanted if name not in checkpoint.state]
        if missing:
            problems.append(
                f"{checkpoint.url}: no {missing[0]!r} ({len(missing)} of {len(wanted)} moments are missing)"
            )
    shapes = {name: inputs[0].model[name].shape for name in names}
    for checkpoint in inputs:
        for moment in wanted:
            place = checkpoint.state.get(moment)
            name = moment.split(".", 1)[1]
            if place is not None and (place.shape != shapes[name] or place.dtype not in FLOAT_DTYPES):
                problems.append(
                    f"{checkpoint.url}: {moment!r} is {place.dtype} {list(place.shape)}, the weight has shape {list(shapes[name])}"
                )
    if problems:
        raise UserError(
            "the policy keeps optimizer moments, but the inputs do not all hold them:\n  "
            + "\n  ".join(problems[:MAX_DIFFERENCES])
            + "\nuse moments: reset, or other inputs"
        )


def _differences(first: Checkpoint, other: Checkpoint, policy: MergePolicy) -> list[str]:
    problems = []
    for name in sorted(first.model.keys() | other.model.keys()):
        if name not in other.model:
            problems.append(f"{name}: missing from {other.url} (present in {first.url})")
        elif name not in first.model:
            problems.append(f"{name}: missing from {first.url} (present in {other.url})")
        else:
            problems += _differ(name, (first, first.model[name]), (other, other.model[name]), policy)
    return problems


def _differ(
    name: str, a: tuple[Checkpoint, TensorPlace], b: tuple[Checkpoint, TensorPlace], policy: MergePolicy
) -> list[str]:
    (first, here), (other, there) = a, b
    problems = []
    if here.shape != there.shape:
        problems.append(f"{name}: shape {list(here.shape)} in {first.url}, {list(there.shape)} in {other.url}")
    if here.dtype != there.dtype and not (_floats(here, there) and _reads_any(name, policy)):
        problems.append(f"{name}: dtype {here.dtype} in {first.url}, {there.dtype} in {other.url}")
    return problems


def _floats(*places: TensorPlace) -> bool:
    return all(place.dtype in FLOAT_DTYPES for place in places)


def _reads_any(name: str, policy: MergePolicy) -> bool:
    rule = policy.rule_for(name)
    return rule is not None and rule.read is not None
