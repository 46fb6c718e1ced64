"""Sections of what other commands put on record: the forecast and its back-test, ablations, the arms of stages."""

from __future__ import annotations

import html
import time
from collections.abc import Mapping
from typing import Any

from pipelines.render_evidence import PREDICTORS
from pipelines.render_stages import LINES, PAIRED
from pipelines.report.arms_chart import arms_chart
from pipelines.report.data import ReportData
from pipelines.report.heat_map import heat_maps, method_label
from pipelines.report.span_view import span_view
from pipelines.report.tables import NONE, Number, caption, chart, number, table

VERDICTS = {-1: "lower", 0: "not told apart", 1: "higher"}


def evidence_charts(data: ReportData) -> dict[str, str]:
    """Charts of ablation and arms, as SVG by name."""
    record = data.evidence.ablation
    charts: dict[str, str] = {}
    if record is not None:
        maps = heat_maps(record["cells"], record["ends"])
        charts |= {f"ablation-{number}": svg for number, svg in enumerate(maps.values(), 1)}
        for end in record["ends"]:
            cells = [cell for cell in record["cells"] if cell["end_step"] == end["step"]]
            if len(end["spans"]) < 2:
                continue
            charts[f"span-{end['step']}"] = span_view(cells, end)
    for place, comparison in enumerate(data.evidence.comparisons, 1):
        if any(seed["curve"] for seed in comparison["seeds"]):
            charts[f"arms-{place}"] = arms_chart(comparison, place)
    return charts


def forecast_section(data: ReportData) -> str:
    """What each predictor says and how far off it was."""
    said = data.evidence.forecast
    if said is None:
        return f"<p>There is no forecast: {html.escape(data.evidence.no_forecast)}.</p>"
    rows: list[list[str | Number]] = []
    for name, label in PREDICTORS.items():
        tests = [said[key].get(name) for key in ("back_test", "back_test_earlier_only")]
        errors = [number(test["mean_absolute_error"] if test else None) for test in tests]
        anneals = number(tests[0]["anneals"] if tests[0] else None, "d")
        mark = " (the forecast)" if name == said["predictor"] else ""
        rows.append([html.escape(label + mark), number(said["predictors"].get(name)), errors[0], errors[1], anneals])
    head = ["predictor", "says", "mean error, from the others", "mean error, from earlier ones", "real anneals"]
    note = (
        f"Held-out loss at the end of an anneal over {said['anneal_tokens']:,} tokens that ends at step {said['step']:,}. Mean "
        "absolute errors on the real anneals of this run, each predicted from the others, or from those that had ended by then."
    )
    unknown = "".join(f"<li>{html.escape(reason)}</li>" for reason in said["cannot_know"])
    what = f"<h3>What it does not know</h3><ul>{unknown}</ul>" if unknown else ""
    return table("Predictors and their back-test", head, rows) + caption(note) + _anneals(said) + what


def ablation_section(data: ReportData, charts: Mapping[str, str]) -> str:
    """Heat maps, the view by span and every cell; empty text for a run without an ablation."""
    record = data.evidence.ablation
    if record is None:
        return ""
    maps = "".join(chart(svg, wide=False) for name, svg in charts.items() if name.startswith("ablation-"))
    spans = "".join(
        chart(
            svg, "If the points fall on one line, the span decides and N and V do not matter on their own.", wide=False
        )
        for name, svg in charts.items()
        if name.startswith("span-")
    )
    others = f" It is the latest of {data.evidence.num_ablations} ablations." if data.evidence.num_ablations > 1 else ""
    note = (
        "All maps share one scale: pale is low, deep is high. “lowest” is the best cell; “take” has the shortest span of those "
        f"not told apart from it (by one standard error over held-out slices, which does not count seeds).{others}"
    )
    lacking = record["lacking"]
    missing = f"{len(lacking)} cells could not be made; the first: {lacking[0]['reason']}" if lacking else ""
    return f'<div class="maps">{maps}</div>{caption(note)}{spans}{_cells(record)}{caption(missing) if missing else ""}'


def arms_section(data: ReportData, charts: Mapping[str, str]) -> str:
    """Arms of a stage against their controls; empty text for a run that is none."""
    parts = []
    for place, record in reversed(list(enumerate(data.evidence.comparisons, 1))):
        seeds = record["seeds"]
        when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(float(record["time"])))
        name = f"Comparison of {when}, {len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
        over = f"over {len(seeds)} seeds" if record["over_seeds"] else "over slices or blocks of one seed"
        note = (
            f"The arm with --init less its control: a negative loss is in favour of --init. Intervals have "
            f"{record['confidence']:.0%} {over}; ratios are of the arm to its control."
        )
        svg = charts.get(f"arms-{place}", "")
        drawn = (
            chart(svg, "Bands are intervals over held-out slices, of each seed by itself.", wide=False) if svg else ""
        )
        parts.append(
            f"<h3>{html.escape(name)}</h3>{drawn}{_differences(record, place)}{caption(note)}{_arms(record, place)}"
        )
    return "".join(parts)


def _anneals(said: Mapping[str, Any]) -> str:
    """Real anneals with the error of each predictor."""
    if not said["anneals"]:
        return ""
    names = [name for name in PREDICTORS if name in said["back_test"]]
    rows: list[list[str | Number]] = [
        [
            html.escape(row["branch"]),
            number(row["fork_step"], ",d"),
            number(row["end_step"], ",d"),
            number(row["annealed_loss"]),
            *(number(said["back_test"][name]["errors"].get(row["branch"]), "+.4f") for name in names),
        ]
        for row in said["anneals"]
    ]
    head = [
        "branch",
        "fork step",
        "end step",
        "annealed loss",
        *(f"error of {name.replace('_', ' ')}" for name in names),
    ]
    return table("Real anneals", head, rows)


def _cells(record: Mapping[str, Any]) -> str:
    marks: dict[str, str] = {}
    for end in record["ends"]:
        marks |= dict.fromkeys(end["not_told_apart"], "not told apart from the lowest")
        marks |= {end["chosen"]: "take"} | {end["best"]: "lowest, take" if end["best"] == end["chosen"] else "lowest"}
    rows: list[list[str | Number]] = [
        [
            html.escape(method_label(cell)),
            number(cell["count"], "d"),
            number(cell["interval_tokens"], ",d"),
            number(cell["span_tokens"], ",d"),
            number(cell["end_step"], ",d"),
            number(cell["loss"]),
            number(cell["gain"], "+.4f"),
            number(cell["gain_error"]),
            html.escape(marks.get(cell["name"], "")),
        ]
        for cell in record["cells"]
    ]
    head = [
        "method",
        "N",
        "V, tokens",
        "span, tokens",
        "end step",
        "loss",
        "lower than raw by",
        "standard error",
        "mark",
    ]
    return table("Cells of the ablation", head, rows)


def _differences(record: Mapping[str, Any], place: int) -> str:
    found = record["over_seeds"] or record["seeds"][0]["differences"]
    names = [*(name for name in LINES if name in found), *sorted(name for name in found if name not in LINES)]
    rows = [_difference(name, found[name]) for name in names]
    head = ["quantity", "difference", "low", "high", "verdict", "over"]
    return table(f"What the arms differ by ({place})", head, rows)


def _difference(name: str, item: Mapping[str, Any]) -> list[str | Number]:
    label = LINES.get(name) or f"held-out loss at the end, {name.rpartition('/')[2]}"
    form = ".3f" if item["is_ratio"] else "+.3g" if name.startswith("num_") else "+.4f"
    verdict = VERDICTS[item["sign"]] if item["low"] is not None else NONE
    return [
        html.escape(f"{label}, ratio" if item["is_ratio"] else label),
        *(number(item[key], form) for key in ("mean", "low", "high")),
        verdict,
        html.escape(f"{item['num']} {PAIRED[item['over']]}"),
    ]


def _arms(record: Mapping[str, Any], place: int) -> str:
    rows: list[list[str | Number]] = []
    for seed in record["seeds"]:
        for name in ("init", "control"):
            arm = seed[name]
            rows.append(
                [
                    f"{name}, seed {seed['seed']}",
                    *(
                        number(arm[key])
                        for key in ("initial_loss", "final_loss", "final_bits_per_byte", "gradient_norm")
                    ),
                    number(arm["num_spikes"], "d"),
                ]
            )
    head = ["arm", "loss at the start", "loss at the end", "bits per byte at the end", "gradient norm", "spikes"]
    return table(f"Arms ({place})", head, rows)
