"""Write ``report.html``: one file with everything inside, nothing fetched."""

from __future__ import annotations

import html
import json

from cluster.tracking import TrackingAway
from configs.load import identity_of
from pipelines.report.answers import answer_all
from pipelines.report.charts import held_out_chart, router_chart, training_chart
from pipelines.report.data import ReportData, gather
from pipelines.report.evidence_sections import ablation_section, arms_section, evidence_charts, forecast_section
from pipelines.report.findings import find_all
from pipelines.report.graph import draw_steps
from pipelines.report.losses import comparison_table, domain_table, scores_table
from pipelines.report.page import answers_list, full_page
from pipelines.report.recoveries import recoveries_section, recovery_chart
from pipelines.report.tables import Number, caption, chart, facts, number, section, table
from pipelines.report.timeline import snapshot_timeline, timeline_caption
from pipelines.tracking import open_forwarder
from pipelines.wording import format_seconds
from tasks.checkpoints.run_folder import RunFolder

REPORT_KEY = "report.html"
NOT_YET = "<p>Nothing to show yet.</p>"
STARTUP_PHASES = {
    "ray_train": "processes and process group",
    "import": "imports",
    "build": "data and model",
    "restore": "state",
}


def write_report(run_url: str) -> str:
    """Write the report into the run folder, hand a copy to MLflow if it answers, and return its URL."""
    run = RunFolder(run_url)
    page, charts = write_page(run)
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


def write_page(run: RunFolder) -> tuple[str, dict[str, str]]:
    """Write the report into the run folder; returns the page and its charts, as SVG by name."""
    data = gather(run.url)
    charts = draw(data)
    page = render(data, charts)
    run.store.put(REPORT_KEY, page.encode())
    return page, charts


def draw(data: ReportData) -> dict[str, str]:
    """The charts, as SVG by name, of what the run has: dense models have no router, most runs no recoveries."""
    charts = {
        "held-out-loss": held_out_chart(data),
        "training": training_chart(data),
        "router-health": router_chart(data),
        "recoveries": recovery_chart(data),
        "snapshot-timeline": snapshot_timeline(data),
        **evidence_charts(data),
    }
    return {name: svg for name, svg in charts.items() if svg}


def render(data: ReportData, charts: dict[str, str]) -> str:
    """The page."""

    def drawn(name: str, note: str) -> str:
        return chart(charts[name], note) if name in charts else ""

    router = "Per layer, over the global batch. A collapse in one layer shows here."
    timeline = timeline_caption(data) if "snapshot-timeline" in charts else ""
    bodies = {
        "In short": answers_list(answer_all(data)),
        "Held-out loss": (drawn("held-out-loss", _held_out_caption(data)) + domain_table(data)) or NOT_YET,
        "What annealing would give": forecast_section(data),
        "How many snapshots to merge": comparison_table(data),
        "Which N, V and method": ablation_section(data, charts),
        "Stages: the arm with init against its control": arms_section(data, charts),
        "Tasks": scores_table(data),
        "Beside the paper": _findings(data),
        "Loss spikes and recoveries": recoveries_section(data, drawn("recoveries", "")),
        "Training": drawn("training", "Means over short stretches of steps.") or NOT_YET,
        "Router health": drawn("router-health", router),
        "A snapshot beside training": drawn("snapshot-timeline", timeline),
        "Steps": draw_steps(data),
        "Where the time went": _time_table(data),
        "Run identity": _identity(data),
    }
    return full_page(
        title=f"pmaflow report: {data.config.name}",
        lead=_lead(data),
        sections=[section(title, body) for title, body in bodies.items() if body],
    )


def _lead(data: ReportData) -> str:
    model = data.config.model
    kind = f"{model.num_experts} experts, top-{model.num_experts_per_token}" if model.is_moe else "dense"
    network = f"{model.family} ({model.num_layers} layers, width {model.hidden_size}, {kind})"
    text = f"{data.config.workload.entry or network}, seed {data.config.seed}. {data.url}"
    url = html.escape(data.evidence.tracking_url)
    return html.escape(text) + (f' <a href="{url}">The run in MLflow</a>' if url else "")


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
    cells: list[list[str | Number]] = [
        [
            html.escape(label),
            kind,
            number(seconds, ",.1f"),
            number(100 * seconds / total if total else None, ".0f", " %"),
        ]
        for label, seconds, kind in rows
    ]
    times = table("Wall clock by stretch", ["stretch", "kind", "seconds", "share"], cells)
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
    rows = {
        "run": data.url,
        "run id": data.identity.run_id,
        "code version": data.identity.code_version,
        "MLflow": data.evidence.tracking_url,
        "segments": ", ".join(
            f"{s['segment']} ({s['cause']}, from step {s['start']['step']:,})" for s in data.segments
        ),
        "last snapshot's content digest": data.last.digest if data.last else "",
    }
    shown = [(key, f"<code>{html.escape(value)}</code>") for key, value in rows.items() if value]
    config = html.escape(json.dumps(identity_of(data.config), indent=1))
    return facts("Who the run is", shown) + f"<details><summary>Configuration</summary><pre>{config}</pre></details>"
