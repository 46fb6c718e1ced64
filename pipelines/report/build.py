"""Write ``report.html``: one file, no scripts, nothing fetched."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable
from pathlib import Path

from cluster.tracking import TrackingAway
from configs.load import identity_of
from pipelines.report.charts import held_out_chart, router_chart, training_chart
from pipelines.report.data import Evaluated, ReportData, gather
from pipelines.report.findings import find_all
from pipelines.report.graph import draw_steps
from pipelines.report.recoveries import recoveries_section, recovery_chart
from pipelines.report.tables import caption, section, table
from pipelines.report.timeline import snapshot_timeline, timeline_caption
from pipelines.tracking import open_forwarder
from pipelines.wording import format_seconds
from tasks.checkpoints.run_folder import RunFolder
from tasks.evaluation.held_out import paired_gain
from tasks.merging.methods import METHODS

REPORT_KEY = "report.html"
NOT_YET = "<p>Nothing to show yet.</p>"
STARTUP_PHASES = {
    "ray_train": "processes and process group",
    "import": "imports",
    "build": "data and model",
    "restore": "state",
}
CSS = (Path(__file__).parent / "report.css").read_text()


def write_report(run_url: str) -> str:
    """Write the report into the run folder, hand a copy to MLflow if it answers, and return its URL."""
    run = RunFolder(run_url)
    data = gather(run_url)
    charts = draw(data)
    page = render(data, charts)
    run.store.put(REPORT_KEY, page.encode())
    forwarder = open_forwarder(run, run.identity().config)
    if forwarder is not None:
        try:
            forwarder.forward()
            forwarder.log_artifact(page, REPORT_KEY)
            for name, svg in charts.items():
                forwarder.log_artifact(svg, f"charts/{name}.svg")
        except TrackingAway:
            pass  # the report is in the run folder; pma status shows the lag
    return f"{run.url}/{REPORT_KEY}"


def draw(data: ReportData) -> dict[str, str]:
    """The charts, as SVG by name, of what the run has: dense models have no router, most runs no recoveries."""
    charts = {
        "held-out-loss": held_out_chart(data),
        "training": training_chart(data),
        "router-health": router_chart(data),
        "recoveries": recovery_chart(data),
        "snapshot-timeline": snapshot_timeline(data),
    }
    return {name: svg for name, svg in charts.items() if svg}


def render(data: ReportData, charts: dict[str, str]) -> str:
    """The page."""
    held_out, training = charts.get("held-out-loss"), charts.get("training")
    router, timeline = charts.get("router-health"), charts.get("snapshot-timeline")
    recoveries = recoveries_section(data, charts.get("recoveries", ""))
    sections = [
        section("What was found", _findings(data)),
        section("Held-out loss", held_out + caption(_held_out_caption(data)) if held_out else NOT_YET),
        section("How many snapshots to merge", _comparison_table(data)),
        section("Loss spikes and recoveries", recoveries) if recoveries else "",
        section("Training", training + caption("Means over short stretches of steps.") if training else NOT_YET),
        section(
            "Router health", router + caption("Per layer, over the global batch. A collapse in one layer shows here.")
        )
        if router
        else "",
        section("A snapshot beside training", timeline + caption(timeline_caption(data))) if timeline else "",
        section("Steps", steps) if (steps := draw_steps(data)) else "",
        section("Where the time went", _time_table(data)),
        section("Run identity", _identity(data)),
    ]
    title = f"pmaflow report: {html.escape(data.config.name)}"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{CSS}</style></head>'
        f"<body><main><h1>{title}</h1>{_lead(data)}{''.join(sections)}</main></body></html>"
    )


def _lead(data: ReportData) -> str:
    model, steps = data.config.model, max((m.step for m in data.journal), default=0)
    kind = f"{model.num_experts} experts, top-{model.num_experts_per_token}" if model.is_moe else "dense"
    network = f"{model.family} ({model.num_layers} layers, width {model.hidden_size}, {kind})"
    text = (
        f"{data.config.workload.entry or network}, {steps:,} steps, "
        f"{steps * data.config.training.batch_tokens / 1e6:.2f} M tokens, seed {data.config.seed}."
    )
    return f'<p class="lead">{html.escape(text)}</p>'


def _findings(data: ReportData) -> str:
    findings = find_all(data)
    if not findings:
        return "<p>Nothing yet: no merge has been evaluated.</p>"
    items = (
        f'<li><span class="verdict {f.verdict.split()[0]}">{html.escape(f.verdict)}</span> {html.escape(f.text)}</li>'
        for f in findings
    )
    return f'<ul class="findings">{"".join(items)}</ul>'


def _held_out_caption(data: ReportData) -> str:
    tokens = data.config.evaluation.slice_tokens * data.config.evaluation.num_slices
    return (
        f"{tokens:,} held-out tokens in {data.config.evaluation.num_slices} slices, the same for every point. "
        f"Merged points use only snapshots taken at constant learning rate, V = {data.config.merge_interval_tokens:,} tokens."
    )


def _comparison_table(data: ReportData) -> str:
    if not data.raw or not data.comparison:
        return "<p>Not enough snapshots to compare.</p>"
    raw = data.raw[-1]
    best = min(row.evaluation.loss for row in data.comparison)
    rows = [["raw snapshot", "1", "–", f"{raw.evaluation.loss:.4f}", "–", _slices(raw.evaluation.slices)]]
    rows += [_comparison_row(row, raw, best) for row in sorted(data.comparison, key=_table_order)]
    head = ["method", "N", "merge span", "held-out loss", "lower than raw by", "slices"]
    note = "All end at the last step. ± is the standard error of the paired difference over slices; it does not include seeds."
    return table(head, rows) + caption(note)


def _table_order(row: Evaluated) -> tuple[int, int]:
    merge = row.manifest.merge
    assert merge is not None
    known = METHODS.index(merge.method) if merge.method in METHODS else len(METHODS)
    return known, len(merge.inputs)


def _comparison_row(row: Evaluated, raw: Evaluated, best: float) -> list[str]:
    merge = row.manifest.merge
    assert merge is not None
    gain, error = paired_gain(raw.evaluation, row.evaluation)
    span = (merge.inputs[-1].tokens_seen or 0) - (merge.inputs[0].tokens_seen or 0)
    loss = f"{row.evaluation.loss:.4f}"
    return [
        f"EMA, alpha {merge.alpha:g}" if merge.method == "ema" else merge.method.upper(),
        str(len(merge.inputs)),
        f"{span / 1e6:.2f} M",
        f"<strong>{loss}</strong> best" if row.evaluation.loss == best else loss,
        f"{gain:+.4f} ± {error:.4f}",
        _slices(row.evaluation.slices),
    ]


def _time_table(data: ReportData) -> str:
    training = sum(seconds for (_, kind), seconds in data.stages.items() if kind == "training")
    evidence = sum(seconds for (_, kind), seconds in data.stages.items() if kind == "evidence")
    ray = sum(seconds for (stage, _), seconds in data.stages.items() if stage == "Ray start")
    steps = max(0.0, training - data.startup_seconds - data.snapshot_seconds)
    total = training + evidence + ray
    rows = [
        ("training steps", steps, "compute"),
        *((f"worker start-up: {label}", seconds, "orchestration") for label, seconds in _startup(data)),
        ("snapshots (training stands still)", data.snapshot_seconds, "orchestration"),
        ("Ray start", ray, "orchestration"),
        ("merges and evaluations that training did not cover", evidence, "evidence"),
    ]
    overhead = data.startup_seconds + data.snapshot_seconds + ray
    times = table(
        ["stretch", "kind", "seconds", "share"],
        [
            [html.escape(label), kind, f"{seconds:.1f}", f"{seconds / total:.0%}" if total else "–"]
            for label, seconds, kind in rows
        ],
    )
    note = (
        f"Wall clock over all invocations: {format_seconds(total)}; orchestration {overhead / total if total else 0:.0%}. "
        f"Beside training, on other CPUs: {len(data.merged)} scheduled merges in {data.merge_seconds:.1f} s."
    )
    return times + caption(note)


def _startup(data: ReportData) -> list[tuple[str, float]]:
    """Start-up of gangs by phase; what no phase accounts for is the last."""
    rows = [(label, data.startup_phases.get(f"{phase}_seconds", 0.0)) for phase, label in STARTUP_PHASES.items()]
    return [*rows, ("the rest", max(0.0, data.startup_seconds - sum(seconds for _, seconds in rows)))]


def _identity(data: ReportData) -> str:
    facts = {
        "run": data.url,
        "run id": data.identity.run_id,
        "code version": data.identity.code_version,
        "segments": ", ".join(
            f"{s['segment']} ({s['cause']}, from step {s['start']['step']:,})" for s in data.segments
        ),
    }
    if data.raw:
        facts["last snapshot's content digest"] = data.raw[-1].manifest.digest
    rows = [[html.escape(key), f"<code>{html.escape(str(value))}</code>"] for key, value in facts.items()]
    config = html.escape(json.dumps(identity_of(data.config), indent=1))
    return table(["", ""], rows, head=False) + f"<details><summary>Configuration</summary><pre>{config}</pre></details>"


def _slices(losses: Iterable[float]) -> str:
    return " ".join(f"{loss:.3f}" for loss in losses)
