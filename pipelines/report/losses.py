"""Sections of held-out losses: the newest checkpoints by domain, merges that end at the last step, scores of tasks."""

from __future__ import annotations

import html
from collections.abc import Mapping

from pipelines.report.answers import last_pair
from pipelines.report.data import Compared, Evaluated, ReportData
from pipelines.report.tables import NONE, Number, caption, number, table
from tasks.evaluation.held_out import paired_gain
from tasks.evaluation.task_scores import TaskScores
from tasks.merging.methods import METHODS

ERROR = "_stderr"
"""Ends the name of a metric's error in what the harness says."""


def newest_checkpoints(data: ReportData) -> list[tuple[str, Evaluated]]:
    """The newest raw snapshot, the newest scheduled merge and the end of each branch, by what the page calls them."""
    found = [("raw", data.raw[-1])] if data.raw else []
    pair = last_pair(data)
    if merged := (pair[1] if pair else data.merged[-1] if data.merged else None):
        found.append((f"merged ({merged.name})", merged))
    return found + [(name, rows[-1]) for name, rows in data.branches.items() if rows]


def domain_table(data: ReportData) -> str:
    """Loss and bits per byte of the newest checkpoints, over all text and by domain; empty text without any."""
    rows: list[list[str | Number]] = []
    for name, row in newest_checkpoints(data):
        measured = row.evaluation
        each = list(measured.domains) if len(measured.domains) > 1 else []
        bits: Mapping[str, float | None] = measured.domain_bits_per_byte
        parts = [("all", measured.loss, measured.bits_per_byte)]
        parts += [(domain, measured.domains[domain], bits.get(domain)) for domain in each]
        rows += [
            [html.escape(name), number(row.tokens / 1e6, ",.2f"), html.escape(domain), number(loss), number(rate)]
            for domain, loss, rate in parts
        ]
    head = ["checkpoint", "tokens seen, millions", "domain", "loss, nats per token", "bits per byte"]
    return table("Newest checkpoints by domain", head, rows) if rows else ""


def comparison_table(data: ReportData) -> str:
    """Every merge that ends at the last step beside the raw snapshot there."""
    if not data.raw or not data.comparison:
        return "<p>No merge that ends at the last step is evaluated.</p>"
    raw = data.raw[-1]
    best = min(item.row.evaluation.loss for item in data.comparison)
    rows: list[list[str | Number]] = [
        ["raw snapshot", number(1, "d"), number(None), number(raw.evaluation.loss), number(None), number(None), _slices(raw)]
    ]  # fmt: skip
    rows += [_comparison_row(item, raw, best) for item in sorted(data.comparison, key=_table_order)]
    head = ["method", "N", "merge span, millions", "held-out loss", "lower than raw by", "standard error", "slices"]
    note = "All end at the last step. The standard error is of the paired difference over slices; it does not include seeds."
    return table("Merges that end at the last step", head, rows) + caption(note)


def scores_table(data: ReportData) -> str:
    """Scores of tasks on record, a row a checkpoint and metric; empty text without any."""
    names = {row.glance.digest: row.name for row in [*data.raw, *data.merged, *(c.row for c in data.comparison)]}
    names |= {row.glance.digest: f"{branch}, {row.name}" for branch, rows in data.branches.items() for row in rows}
    rows = [row for record in data.evidence.scores for row in _score_rows(record, names)]
    head = ["task", "metric", "checkpoint", "tokens seen, millions", "score", "standard error", "questions"]
    versions = ", ".join(sorted({record.harness for record in data.evidence.scores}))
    note = f"By lm-evaluation-harness {versions}; standard errors are the harness's own."
    return table("Scores of tasks", head, rows) + caption(note) if rows else ""


def _score_rows(record: TaskScores, names: Mapping[str, str]) -> list[list[str | Number]]:
    name = names.get(record.digest, f"step {record.step}" if record.step is not None else record.digest[:12])
    tokens = number(record.tokens_seen / 1e6 if record.tokens_seen is not None else None, ",.2f")
    return [
        [
            html.escape(task),
            html.escape(metric),
            html.escape(name),
            tokens,
            number(value),
            number(values.get(metric + ERROR)),
            number(record.samples.get(task), ",d"),
        ]
        for task, values in record.scores.items()
        for metric, value in values.items()
        if not metric.endswith(ERROR)
    ]


def _table_order(item: Compared) -> tuple[int, int]:
    method = item.merge.method
    return METHODS.index(method) if method in METHODS else len(METHODS), len(item.merge.inputs)


def _comparison_row(item: Compared, raw: Evaluated, best: float) -> list[str | Number]:
    merge, evaluation = item.merge, item.row.evaluation
    gain, error = paired_gain(raw.evaluation, evaluation)
    span = (merge.inputs[-1].tokens_seen or 0) - (merge.inputs[0].tokens_seen or 0)
    loss = number(evaluation.loss, more=" best" if evaluation.loss == best else "")
    return [
        html.escape(f"EMA, alpha {merge.alpha:g}" if merge.method == "ema" else merge.method.upper()),
        number(len(merge.inputs), "d"),
        number(span / 1e6, ",.2f"),
        loss if evaluation.loss != best else Number(value=loss.value, text=f"<strong>{loss.text}</strong>"),
        number(gain, "+.4f"),
        number(error),
        _slices(item.row),
    ]


def _slices(row: Evaluated) -> str:
    return " ".join(f"{loss:.3f}" for loss in row.evaluation.slices) or NONE
