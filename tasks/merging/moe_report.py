"""How experts and routers moved between the inputs of a merge, from a sample of their weights.

Averaging is elementwise, so it is only right where expert e is the same expert in every input. Within one
run it is; between runs experts may be permuted, and then a mean destroys both.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.checkpoints.reader import Checkpoint
from tasks.checkpoints.regions import TensorPlace
from tasks.checkpoints.safetensors_header import DTYPE_BYTES
from tasks.checkpoints.tensor_reader import TensorReader
from tasks.merging.kernel import FLOAT_DTYPES, widen

SAMPLE_ELEMENTS = 4096
"""Elements that stand for an expert: enough to tell experts apart, a few MB for a thousand of them."""
_EXPERT = re.compile(r"^(?P<layer>.*)\.experts\.(?P<expert>\d+)\.(?P<tensor>.+)$")
_FUSED = re.compile(r"^(?P<layer>.*)\.experts\.(?P<tensor>gate_up_proj|down_proj|w1|w2|w3)$")
_ROUTER = re.compile(r"^(?P<layer>.*)\.(gate|router)\.(weight|.*e_score_correction_bias)$")

Sample = NDArray[np.float64]


def describe_experts(inputs: Sequence[Checkpoint]) -> dict[str, Any]:
    """The report as JSON: per layer the drift between neighbouring inputs, and ``warnings`` in words.

    Drift is the relative L2 distance of an expert's sample to the same expert's in the input before. An expert is
    suspected to be permuted if its sample is closer (by cosine) to another expert's of the input before than to its
    own, and dead if it did not move at all between two inputs while others of its layer did, or is all zero.
    """
    layers = [_describe_layer(layer, places, inputs) for layer, places in _layers_of(inputs[-1]).items()]
    routers = [_describe_router(name, inputs) for name in inputs[-1].model if _ROUTER.match(name)]
    warnings = [warning for row in layers for warning in row.pop("warnings")]
    return {"sampled_elements_per_expert": SAMPLE_ELEMENTS, "layers": layers, "routers": routers, "warnings": warnings}


def _layers_of(checkpoint: Checkpoint) -> dict[str, list[tuple[str, int, int]]]:
    """Layer to (tensor, first element, length) that stands for each of its experts, in order of experts."""
    layers: dict[str, dict[int, tuple[str, int, int]]] = {}
    for name, place in sorted(checkpoint.model.items()):
        if place.dtype not in FLOAT_DTYPES:
            continue
        if match := _EXPERT.match(name):
            layer = layers.setdefault(match["layer"], {})
            layer.setdefault(int(match["expert"]), (name, 0, min(SAMPLE_ELEMENTS, place.num_elements)))
        elif (match := _FUSED.match(name)) and len(place.shape) == 3:
            size = place.num_elements // place.shape[0]
            layer = layers.setdefault(match["layer"], {})
            for expert in range(place.shape[0]):
                layer.setdefault(expert, (name, expert * size, min(SAMPLE_ELEMENTS, size)))
    return {layer: [experts[number] for number in sorted(experts)] for layer, experts in layers.items()}


def _describe_layer(layer: str, experts: list[tuple[str, int, int]], inputs: Sequence[Checkpoint]) -> dict[str, Any]:
    samples = [_read_experts(checkpoint, experts) for checkpoint in inputs]
    drifts, warnings = [], []
    for number, (before, after) in enumerate(itertools.pairwise(samples), start=1):
        drift = _norms(after - before) / np.maximum(_norms(before), np.finfo(np.float64).tiny)
        drifts.append(drift)
        where = f"{layer}, inputs {number} and {number + 1}"
        warnings += _permuted(before, after, where)
        if drift.any():
            warnings += [f"{where}: expert {expert} did not move, others did" for expert in np.flatnonzero(drift == 0)]
    for number, sample in enumerate(samples, start=1):
        warnings += [f"{layer}, input {number}: expert {e} is all zero" for e in np.flatnonzero(_norms(sample) == 0)]
    return {
        "layer": layer,
        "experts": len(experts),
        "drift_mean": [float(drift.mean()) for drift in drifts],
        "drift_max": [float(drift.max()) for drift in drifts],
        "drift_max_expert": [int(drift.argmax()) for drift in drifts],
        "warnings": warnings,
    }


def _permuted(before: Sample, after: Sample, where: str) -> list[str]:
    similar = _unit(after) @ _unit(before).T
    closest = similar.argmax(axis=1)
    own = np.arange(len(closest))
    swapped = np.flatnonzero((closest != own) & (similar[own, closest] > similar[own, own] + 0.05))
    return [
        f"{where}: expert {e} looks like expert {closest[e]} of the input before (cosine {similar[e, closest[e]]:.2f}, "
        f"with itself {similar[e, e]:.2f}): experts may be permuted, and a mean would destroy them"
        for e in swapped
    ]


def _describe_router(name: str, inputs: Sequence[Checkpoint]) -> dict[str, Any]:
    place = inputs[-1].model[name]
    values = [_read(checkpoint, name, 0, place.num_elements) for checkpoint in inputs]
    shifts = [
        float(np.linalg.norm(after - before) / max(np.linalg.norm(before), np.finfo(np.float64).tiny))
        for before, after in itertools.pairwise(values)
    ]
    return {"tensor": name, "shift": shifts}


def _read_experts(checkpoint: Checkpoint, experts: list[tuple[str, int, int]]) -> Sample:
    length = min(size for _, _, size in experts)
    return np.stack([_read(checkpoint, name, start, start + length) for name, start, _ in experts])


def _read(checkpoint: Checkpoint, name: str, start: int, end: int) -> Sample:
    place: TensorPlace = checkpoint.model[name]
    data = bytearray((end - start) * DTYPE_BYTES[place.dtype])
    with TensorReader(checkpoint.store) as reader:
        reader.read_into(place, start, end, memoryview(data))
    if place.dtype == "BF16":
        return widen(np.frombuffer(data, np.uint16)).astype(np.float64)
    return np.frombuffer(data, {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[place.dtype]).astype(np.float64)


def _norms(rows: Sample) -> Sample:
    return np.asarray(np.linalg.norm(rows, axis=1))


def _unit(rows: Sample) -> Sample:
    return rows / np.maximum(_norms(rows), np.finfo(np.float64).tiny)[:, None]
