"""Charts and evidence of a run as artifacts: held-out curves, arms beside each other, ablations, the forecast.

Charts are drawn by whoever asks, never by a thread beside it: matplotlib serves one thread at a time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.storage import Store
from cluster.tracking import Point
from configs.errors import UserError
from configs.schema import Config
from tasks.checkpoints.digest import fingerprint
from tasks.checkpoints.run_folder import RUN_KEY, RunFolder

COMPARISONS = "comparisons"
"""Folder of a run's comparisons of arms."""
ABLATIONS = "ablations"
"""Folder of a run's ablation records."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What one item comes to: artifacts, and metrics beside them."""

    artifacts: Mapping[str, str]
    """Path to text."""
    points: Sequence[Point] = field(default=())
    """Metrics."""


def pending_charts(run: RunFolder, config: Config, sent: set[str], *, is_branch: bool) -> list[str]:
    """Items that were not drawn yet, curves only once the run is trained to its end, as ``chart/<what>@<fingerprint of what it is drawn of>``."""
    items = [f"chart/comparison@{_stem(key)}" for key in run.store.keys(COMPARISONS)]
    items += [f"chart/ablation@{_stem(key)}" for key in ablation_keys(run.store)]
    snapshots = run.glances()
    # A branch is a curve in its run's chart.
    if not is_branch and snapshots and (snapshots[-1].tokens_seen or 0) >= config.training.total_tokens:
        shown = fingerprint(_evaluations_below(run))[:16]
        items += [f"chart/held-out@{shown}", f"chart/forecast@{shown}"]
    return [item for item in items if item not in sent]


def draw(run: RunFolder, config: Config, item: str) -> Evidence | None:
    """The evidence that ``item`` stands for; None if there is nothing to show."""
    what, _, name = item.removeprefix("chart/").partition("@")
    if what == "held-out":
        return _held_out(run)
    if what == "forecast":
        return _forecast(run)
    if what == "comparison":
        return _comparison(json.loads(run.store.read(f"{COMPARISONS}/{name}.json")))
    return _ablation(json.loads(run.store.read(f"{ABLATIONS}/{name}.json")), name, config)


def ablation_keys(store: Store) -> list[str]:
    """Records of ablations; cells and their records lie deeper."""
    return [key for key in store.keys(ABLATIONS) if key.count("/") == 1 and key.endswith(".json")]


def _held_out(run: RunFolder) -> Evidence | None:
    from pipelines.report.charts import held_out_chart
    from pipelines.report.data import gather

    text = held_out_chart(gather(run.url))
    return Evidence(artifacts={"charts/held-out-loss.svg": text}) if text else None


def _comparison(comparison: Mapping[str, Any]) -> Evidence | None:
    from pipelines.report.arms_chart import arms_chart

    if not any(seed["curve"] for seed in comparison["seeds"]):
        return None
    return Evidence(artifacts={"charts/comparison.svg": arms_chart(comparison)})


def _forecast(run: RunFolder) -> Evidence | None:
    from pipelines.forecast import forecast

    try:
        found = forecast(run.url)
    except UserError:  # Nothing is evaluated, or no anneal fits before the run's end: there is nothing to say.
        return None
    if found["forecast_loss"] is None:
        return None
    step, (low, high) = found["step"], found["interval"] or (None, None)
    tokens = step * run.identity().config.training.batch_tokens
    values = {"forecast/loss": found["forecast_loss"], "forecast/low": low, "forecast/high": high}
    return Evidence(
        artifacts={"forecast.json": json.dumps(found, indent=1)},
        points=_points(values, tokens, run.identity().created),
    )


def _ablation(record: Mapping[str, Any], name: str, config: Config) -> Evidence:
    from pipelines.report.drawing import slug
    from pipelines.report.heat_map import heat_maps
    from pipelines.report.span_view import span_view

    artifacts = {f"ablations/{name}.json": json.dumps(record, indent=1)}
    for title, text in heat_maps(record["cells"], record["ends"]).items():
        artifacts[f"charts/ablation-{name}/{slug(title)}.svg"] = text
    for end in record["ends"]:
        cells = [cell for cell in record["cells"] if cell["end_step"] == end["step"]]
        artifacts[f"charts/ablation-{name}/span-step-{end['step']:09d}.svg"] = span_view(cells, end)
    losses = {cell["name"]: cell["loss"] for cell in record["cells"]}
    points: list[Point] = []
    for end in record["ends"]:
        chosen = end["recommended"]
        values = {
            "ablation/best_loss": losses.get(end["best"]),
            "ablation/chosen_loss": losses.get(end["chosen"]),
            "ablation/raw_loss": end["raw_loss"],
            "ablation/chosen_count": chosen["count"],
            "ablation/chosen_interval_tokens": chosen["interval_tokens"],
        }
        points += _points(values, end["step"] * config.training.batch_tokens, float(record.get("created", 0.0)))
    return Evidence(artifacts=artifacts, points=points)


def _points(values: Mapping[str, float | None], tokens: int, time: float) -> list[Point]:
    return [
        Point(metric=key, value=float(value), step=tokens, time=time)
        for key, value in values.items()
        if value is not None and math.isfinite(value)
    ]


def _evaluations_below(run: RunFolder) -> list[str]:
    return [f"{folder.url}/{key}" for folder in _folders(run) for key in folder.store.keys("evaluations")]


def _folders(run: RunFolder) -> Iterator[RunFolder]:
    yield run
    for name in run.branches():
        if run.branch(name).store.exists(RUN_KEY):
            yield run.branch(name)


def _stem(key: str) -> str:
    return key.rpartition("/")[2].removesuffix(".json")
