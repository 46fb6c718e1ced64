"""Descriptions of runs in MLflow: the answer in the first line, then where everything lies."""

from __future__ import annotations

import json
import math
from typing import Any

from configs.schema import Config
from pipelines.tracked.charts import COMPARISONS
from tasks.checkpoints.catalog import Glance, Look
from tasks.checkpoints.run_folder import RUN_KEY, RunFolder
from tasks.evaluation.held_out import evaluation_key, read_loss, suite_of
from tasks.merging.schedule import scheduled_rule

NOTE_TAG = "mlflow.note.content"
PARTS = {
    "merges": "Merged checkpoints of the run: `lineage/` says of each what it was made of; those that were registered are model versions.",
    "evaluations": "Held-out loss of snapshots (`evaluation/raw_loss`) and merges over tokens seen.",
    "group": "The rest of their kind, so that the run keeps few children.",
}
"""What is said of runs that hold no training of their own."""


def describe_run(run: RunFolder, config: Config, decisions: dict[str, Any]) -> str:
    """The description of a run or a branch, in Markdown, from the run folder alone."""
    look = run.look()
    lines = [_answer(run, config, look), ""]
    start = run.identity().start
    if start is not None:
        what = "began with the weights of" if start.weights_only else f"forked at step {start.step:,} from"
        lines.append(f"- {what} `{start.url}`")
    lines.append(f"- run folder: `{run.url}`")
    lines.append(f"- report: `{run.url}/report.html`, written by `pma report --run {run.url}`")
    for decision in decisions.values():
        verb = "moved to" if decision["moved"] else "stays where it is;"
        lines.append(
            f"- `{decision['model']}@{decision['alias']}` {verb} version {decision['version']}: {decision['reason']}"
        )
    lines += [f"- {line}" for line in _recoveries(look)]
    return "\n".join(lines)


def describe_segment(run: RunFolder, number: int) -> str:
    """The description of a stretch of training."""
    found = next((segment for segment in run.segments() if segment["segment"] == number), None)
    if found is None:
        return f"Segment {number}."
    return f"Training from step {found['start']['step']:,}; begun by: {found['cause']}."


def _answer(run: RunFolder, config: Config, look: Look) -> str:
    """One line: what the run is worth."""
    if said := _comparison(run):
        return said
    snapshots, suite = look.snapshots(), suite_of(config)
    if not snapshots:
        return "No snapshot is committed yet."
    measured = ((glance, loss) for glance in reversed(snapshots) if (loss := _loss(run, glance, suite)) is not None)
    last, raw = next(measured, (snapshots[-1], None))
    if raw is None:
        return f"**{len(snapshots)} snapshots**, none evaluated yet."
    parts = [f"raw {raw:.4f}"]
    merged = look.merged().get(scheduled_rule(config).name_at(last))
    if merged is not None and (loss := _loss(run, merged, suite)) is not None:
        count = len(merged.inputs)
        parts.append(f"merged {loss:.4f} ({str(merged.method).upper()} of {count}, {loss - raw:+.4f})")
    parts += _annealed(run, config, raw)
    return f"**Held-out loss at step {last.step:,}: {'; '.join(parts)}.**"


def _annealed(run: RunFolder, config: Config, raw: float) -> list[str]:
    """The best anneal among the run's branches."""
    found = []
    for name in run.branches():
        branch = run.branch(name)
        if not branch.store.exists(RUN_KEY) or not branch.identity().config.schedule.decay_tokens:
            continue
        glances = branch.glances()
        start = branch.identity().start
        if glances and start is not None and not start.weights_only:
            loss = _loss(branch, glances[-1], suite_of(branch.identity().config))
            if loss is not None and suite_of(branch.identity().config) == suite_of(config):
                found.append((loss, start.step))
    if not found:
        return []
    loss, step = min(found)
    return [f"annealed from step {step:,} {loss:.4f} ({loss - raw:+.4f})"]


def _comparison(run: RunFolder) -> str:
    """What the newest comparison of arms found."""
    records = [json.loads(run.store.read(key)) for key in run.store.keys(COMPARISONS)]
    if not records:
        return ""
    newest = max(records, key=lambda record: float(record["time"]))
    differences = newest["over_seeds"] or newest["seeds"][0]["differences"]
    final = differences.get("final_loss")
    if final is None:
        return ""
    word = {-1: "lower than", 1: "higher than", 0: "not told apart from"}[final["sign"]]
    interval = "" if final["low"] is None else f" ({final['low']:+.4f} to {final['high']:+.4f})"
    return (
        f"**Final held-out loss {word} the control's: {final['mean']:+.4f}{interval}, "
        f"over {final['num']} {final['over']}.**"
    )


def _recoveries(look: Look) -> list[str]:
    count = len(look.recoveries)
    return [f"recoveries from loss spikes: {count}"] if count else []


def _loss(run: RunFolder, glance: Glance, suite: str) -> float | None:
    data = run.store.read_if_present(evaluation_key(glance.digest, suite))
    loss = None if data is None else read_loss(data)
    return loss if loss is not None and math.isfinite(loss) else None
