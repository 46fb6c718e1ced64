"""The second-order picture of a trunk's last window: is the gain of merging what the Hessian says."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from configs.schema import Config
from pipelines.study.layout import Study
from tasks.data.held_out import held_out_batches
from tasks.data.stream import open_stream
from tasks.merging.selection import WindowRule, select_window

if TYPE_CHECKING:
    import torch

    from tasks.evaluation.curvature import LossSurface, Vector


def measure_curvature(study: Study, seed: int) -> dict[str, Any]:
    """Gain of averaging the last snapshots, measured and by the Hessian, and Eq. 15's cross terms around the annealed weights."""
    from tasks.evaluation.curvature import cross_ratio, cross_terms, is_average_better, merge_gain

    surface, network = _open(study, seed)
    points = _window(study, seed, network)
    gain = merge_gain(surface, points)
    table = cross_terms(surface, points, _read(network, study.start_url("annealed", seed)))
    off = [value for i, row in enumerate(table) for j, value in enumerate(row) if i != j]
    return {
        "losses": list(gain.losses),
        "merged_loss": gain.merged_loss,
        "measured": gain.measured,
        "predicted": gain.predicted,
        "cross_terms": table,
        "cross_ratio": cross_ratio(table),
        "negative_cross_terms": sum(value < 0 for value in off) / len(off),
        "is_average_better": is_average_better(table),
    }


def measure_contour(study: Study, seed: int) -> dict[str, Any]:
    """Loss in the plane of two tensors of the last layer, with the snapshots and their average in it."""
    from tasks.evaluation.curvature import contour

    surface, network = _open(study, seed)
    points = _window(study, seed, network)
    layer = f"layers.{study.trunk_config(seed).model.num_layers - 1}."
    inside = sorted((name for name, value in points[0].items() if layer in name and value.ndim >= 2), key=len)
    attention = next(name for name in inside if name.endswith("o_proj.weight"))
    other = max((name for name in inside if "self_attn" not in name), key=lambda name: points[0][name].numel())
    found = contour(surface, points, (attention, other), study.config.curvature.contour_points)
    return asdict(found)


def _open(study: Study, seed: int) -> tuple[LossSurface, torch.nn.Module]:
    """The loss on the trunk's held-out text, with experts whose products have second derivatives."""
    import torch

    from tasks.evaluation.curvature import LossSurface
    from tasks.models.build import build_model

    torch.set_num_threads(1)
    config = _with_plain_experts(study.trunk_config(seed))
    network: torch.nn.Module = build_model(config.model, config.training.sequence_length)
    stream = open_stream(config, "held_out")
    try:
        slices = held_out_batches(stream, config)
    finally:
        stream.close()
    rows = np.concatenate([batch.tokens_BS1 for found in slices for batch in found.values()])
    count = max(1, study.config.curvature.tokens // config.training.sequence_length)
    chosen = rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)]
    return LossSurface(network, torch.from_numpy(chosen)), network


def _window(study: Study, seed: int, network: torch.nn.Module) -> list[Vector]:
    run, config = study.trunk(seed), study.config.curvature
    interval = study.trunk_config(seed).snapshots.interval_tokens
    rule = WindowRule(method="sma", count=config.count, interval_tokens=interval, alpha=None)
    return [_read(network, glance.url) for glance in select_window(run.glances(), rule)]


def _read(network: torch.nn.Module, url: str) -> Vector:
    from tasks.checkpoints.tied import open_untied
    from tasks.models.weights import load_weights

    load_weights(network, open_untied(url))
    return {name: p.detach().clone() for name, p in network.named_parameters() if p.is_floating_point()}


def _with_plain_experts(config: Config) -> Config:
    if not config.model.is_moe:
        return config
    return replace(config, model=replace(config.model, experts_implementation="eager"))
