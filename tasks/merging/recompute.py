"""Recompute a random sample of a merge in float64, by a path of its own.

Shares no arithmetic with the merge kernel: bytes are decoded to float64 by NumPy alone and summed in float64.
The seed is the checkpoint's own digest, so that a verification can be repeated and its sample not chosen.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.storage import Store
from tasks.checkpoints.groups import group_of
from tasks.checkpoints.manifest import Manifest, Merge
from tasks.checkpoints.reader import Checkpoint, place_of
from tasks.checkpoints.regions import TensorPlace
from tasks.checkpoints.safetensors_header import DTYPE_BYTES
from tasks.checkpoints.tensor_reader import TensorReader
from tasks.checkpoints.tied import open_untied
from tasks.merging.methods import SUM_TOLERANCE, MethodChoice
from tasks.merging.policy import BUFFER_PATTERNS, DTYPE_NAMES

SAMPLES = 128
SAMPLE_ELEMENTS = 4096
# Half a unit in the last place, relative, of the output dtype; and its smallest step, near zero.
OUTPUT_EPSILON = {"F64": 2.0**-53, "F32": 2.0**-24, "BF16": 2.0**-8, "F16": 2.0**-11}
SMALLEST = {"F64": 0.0, "F32": 2.0**-149, "BF16": 2.0**-133, "F16": 2.0**-24}


def check_sample(store: Store, manifest: Manifest, merge: Merge) -> Iterator[str]:
    """Problems of a random sample of the merge's elements, weights and moments alike, against its inputs as they are now."""
    inputs = [open_untied(item.url) for item in merge.inputs]
    written = {entry.name: place_of(shard.key, entry) for shard in manifest.shards for entry in shard.tensors}
    # What an input lacks or holds in another shape is the census's to name.
    floats = [name for name in sorted(written) if _is_comparable(written[name], name, inputs, merge)]
    random = np.random.default_rng(int(manifest.digest[:15], 16))
    for name in random.choice(floats, SAMPLES) if floats else []:
        place = written[name]
        start = int(random.integers(0, max(1, place.num_elements - SAMPLE_ELEMENTS + 1)))
        end = min(start + SAMPLE_ELEMENTS, place.num_elements)
        stored = read_float64(store, place, start, end)
        used = [(w, c) for w, c in zip(weights_of(name, merge), inputs, strict=True) if w is not None]
        values = [read_float64(c.store, _places(c)[name], start, end) for _, c in used]
        terms = [weight * value for (weight, _), value in zip(used, values, strict=True)]
        slack = _read_epsilon(name, merge) * np.sum(np.abs(terms), axis=0)
        convex = min(w for w, _ in used) >= 0 and abs(sum(w for w, _ in used) - 1) <= SUM_TOLERANCE
        yield from _compare(str(name), start, stored, terms, slack, place.dtype, values if convex else [])


def weights_of(name: str, merge: Merge) -> Sequence[float | None]:
    """Weight of each input for one tensor: the merge's, or what the recorded policy says of the tensor."""
    newest = (*(None,) * (len(merge.inputs) - 1), 1.0)
    of_moment = name.startswith(("exp_avg.", "exp_avg_sq."))
    tensor = name.split(".", 1)[1] if of_moment else name
    if of_moment and merge.policies.get("optimizer_moments") == "newest":
        return newest
    rule = _rule_of(tensor, merge)
    if rule is None or "method" not in rule:
        is_buffer = any(fnmatch.fnmatchcase(tensor, pattern) for pattern in BUFFER_PATTERNS)
        return newest if is_buffer and merge.policies.get("buffers") == "newest" else merge.weights
    if rule["method"] == "newest":
        return newest
    choice = MethodChoice(
        method=rule["method"], alpha=rule.get("alpha"), weights=tuple(rule["weights"]) if "weights" in rule else None
    )
    return choice.build([item.tokens_seen for item in merge.inputs])


def _rule_of(tensor: str, merge: Merge) -> dict[str, Any] | None:
    for rule in merge.policies.get("rules", []):
        if fnmatch.fnmatchcase(tensor, rule["tensors"]) or fnmatch.fnmatchcase(group_of(tensor), rule["tensors"]):
            return dict(rule)
    return None


def _read_epsilon(name: str, merge: Merge) -> float:
    """Relative error of the rounding that a rule's ``read`` may add to every input."""
    rule = _rule_of(name, merge)
    return OUTPUT_EPSILON[DTYPE_NAMES[rule["read"]]] if rule is not None and "read" in rule else 0.0


def _places(checkpoint: Checkpoint) -> dict[str, TensorPlace]:
    return {**checkpoint.state, **checkpoint.model}


def _is_comparable(place: TensorPlace, name: str, inputs: Sequence[Checkpoint], merge: Merge) -> bool:
    used = [c for c, weight in zip(inputs, weights_of(name, merge), strict=True) if weight is not None]
    theirs = [_places(checkpoint).get(name) for checkpoint in used]
    return (
        place.num_elements > 0
        and place.dtype in OUTPUT_EPSILON
        and all(p is not None and p.shape == place.shape and p.dtype in OUTPUT_EPSILON for p in theirs)
    )


def _compare(
    name: str,
    start: int,
    stored: NDArray[np.float64],
    terms: list[NDArray[np.float64]],
    slack: NDArray[np.float64],
    dtype: str,
    values: list[NDArray[np.float64]],
) -> Iterator[str]:
    """Problems of ``stored`` against weighted ``terms``; ``values`` are the inputs of a convex mean, else empty."""
    exact = np.sum(terms, axis=0)
    accumulate = 2.0**-53 if dtype == "F64" else 2.0**-24
    bound = (len(terms) + 2) * accumulate * np.sum(np.abs(terms), axis=0) + slack
    bound += OUTPUT_EPSILON[dtype] * np.abs(exact) * (1 + 2.0**-8) + SMALLEST[dtype]
    wrong = np.abs(stored - exact) > bound
    if not np.isfinite(stored).all() or wrong.any():
        at = int(np.argmax(wrong | ~np.isfinite(stored)))
        yield f"tensor {name!r}, element {start + at}: stored {stored[at]!r}, the inputs give {exact[at]!r}"
    if values:
        low, high = np.min(values, axis=0) - bound, np.max(values, axis=0) + bound
        if ((stored < low) | (stored > high)).any():
            at = int(np.argmax((stored < low) | (stored > high)))
            yield f"tensor {name!r}, element {start + at}: stored {stored[at]!r} lies outside its inputs' bounds"


def read_float64(store: Store, place: TensorPlace, start: int, end: int) -> NDArray[np.float64]:
    """Elements ``start`` to ``end`` of a floating-point tensor, decoded by NumPy alone."""
    data = bytearray((end - start) * DTYPE_BYTES[place.dtype])
    with TensorReader(store) as reader:
        reader.read_into(place, start, end, memoryview(data))
    if place.dtype == "BF16":
        words = np.zeros((end - start, 2), dtype="<u2")
        words[:, 1] = np.frombuffer(data, dtype="<u2")
        return words.view("<f4")[:, 0].astype(np.float64)
    return np.frombuffer(data, dtype={"F64": "<f8", "F32": "<f4", "F16": "<f2"}[place.dtype]).astype(np.float64)
