"""The page of a study: each finding of the paper beside ours, charts, and everything that it takes to repeat it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from pipelines.render_evidence import PREDICTORS
from pipelines.steps import StepRecord
from pipelines.study.charts import draw_charts
from pipelines.study.findings import margin_of
from pipelines.study.layout import Study
from pipelines.study.merging_findings import MARGIN
from pipelines.study.spike_arms import TOLERANCE, table
from tasks.checkpoints.run_folder import code_version
from tasks.evaluation.verdicts import Claim, Finding

Results = Mapping[str, Mapping[str, Any]]
_ARMS_TOLD = (
    "Means over seeds. Gradient norms are before clipping; their variance is within blocks of consecutive steps; a step stands out "
    "if its loss or norm is far from the 128 steps before."
)


def write_page(study: Study, records: Mapping[str, StepRecord], findings: Sequence[Finding], folder: str) -> str:
    """Write ``<folder>/<study's name>.md`` with its charts and figures beside it; returns its path."""
    name, place = study.config.name, Path(folder.removeprefix("file://"))
    images = place / name
    images.mkdir(parents=True, exist_ok=True)
    results = {key: record.result for key, record in records.items()}
    charts = draw_charts(study, results, findings)
    for file, (svg, _) in charts.items():
        (images / file).write_text(svg)
    (images / "figures.json").write_text(json.dumps(results, indent=1, sort_keys=True))
    parts = [
        *_head(study, findings),
        *_table(findings),
        *_rules(study, results),
        *_charts(name, charts),
        *_arms(study, results),
        *_forecast(study, results),
        *_spikes(study, results),
        *_how(study, records),
    ]
    page = place / f"{name}.md"
    page.write_text("\n".join(parts) + "\n")
    return str(page)


def _head(study: Study, findings: Sequence[Finding]) -> list[str]:
    counts = Counter(finding.verdict for finding in findings)
    told = ", ".join(
        f"{counts[verdict]} {verdict}"
        for verdict in ("reproduced", "partly", "not reproduced", "not measured")
        if counts[verdict]
    )
    model = study.trunk_config(study.config.seeds[0]).model
    failed = [finding.name for finding in findings if finding.verdict == "not reproduced"]
    return [
        f"# Study `{study.config.name}`: the paper's findings on this machine",
        "",
        f"**Of {len(findings)} findings: {told}.**" + (f" Not reproduced: {', '.join(failed)}." if failed else ""),
        "",
        (
            f"Model merging in pre-training (arXiv 2505.12082), repeated with `{study.config.base}`: {model.family}, width {model.hidden_size}, "
            f"{model.num_layers} layers, {model.num_experts or 'no'} experts; {len(study.config.seeds)} seeds. The paper's models are a thousand times "
            "larger and scored on benchmarks; here it is held-out loss in nats per byte. A finding that holds here need not hold there, nor the other way round."
        ),
        "",
    ]


def _table(findings: Sequence[Finding]) -> list[str]:
    lines = [
        "| paper's finding | ours, mean over seeds (95 % interval) | is to be | verdict |",
        "|---|---|---|---|",
    ]
    for finding in findings:
        lines.append(
            f"| **{finding.name}** ({finding.source}). {finding.text} | {finding.remark} | | **{finding.verdict}** |"
        )
        lines += [f"| · {claim.text} | {_number(claim)} | {claim.rule} | {claim.verdict} |" for claim in finding.claims]
    return [*lines, ""]


def _number(claim: Claim) -> str:
    found, unit = claim.interval, f" {claim.unit}" if claim.unit else ""
    if found is None:
        return "not finite" if claim.values else "-"
    if found.low is None or found.high is None:
        return f"{found.mean:+.4f}{unit}"
    return f"{found.mean:+.4f}{unit} ({found.low:+.4f} to {found.high:+.4f})"


def _rules(study: Study, results: Results) -> list[str]:
    return [
        "## Rules",
        "",
        (
            "Stated in `pipelines/study/*_findings.py`, the same for every study. A claim is **reproduced** if its 95 % interval over seeds (Student's t) lies where "
            "the table says, **partly** if the mean does but not the whole interval, **not reproduced** if the mean does not. A finding of several claims is "
            "reproduced or not reproduced if all of them are, else partly."
        ),
        "",
        f'"No difference" is less than {MARGIN:.0%} of the stable phase\'s gain, {margin_of(study, results):.4f} nats here.',
        "",
    ]


def _charts(name: str, charts: Mapping[str, tuple[str, str]]) -> list[str]:
    lines = ["## Charts", ""]
    for file, (_, caption) in charts.items():
        lines += [f"![{caption}]({name}/{file})", "", caption, ""]
    return lines


def _arms(study: Study, results: Results) -> list[str]:
    """Arms of the later stages in figures, means over seeds."""
    lines: list[str] = []
    for kind, title, stage in (
        ("continued", "Continued training", study.config.continued),
        ("sft", "SFT", study.config.sft),
    ):
        if stage is None:
            continue
        lines += [
            f"## {title}, arm by arm",
            "",
            _ARMS_TOLD,
            "",
            "| arm | begins with | loss at the start | at the end | gradient norm | its variance | steps that stand out |",
            "|---|---|---|---|---|---|---|",
        ]
        for arm in stage.arms:
            found = [results[f"{kind}-{seed}"]["arms"][arm.name] for seed in study.config.seeds]
            names = ("initial_loss", "final_loss", "gradient_norm", "gradient_variance", "num_excursions")
            cells = [[item[name] for item in found if item[name] is not None] for name in names]
            told = [f"{fmean(values):.4f}" if values else "-" for values in cells[:-1]]
            lines.append(f"| {arm.name} | {arm.start} | {' | '.join(told)} | {fmean(cells[-1]):.1f} |")
        lines.append("")
    return lines


def _forecast(study: Study, results: Results) -> list[str]:
    """Mean absolute errors of the predictors of an anneal, over all real ones."""
    lines = [
        "## Forecast back-test",
        "",
        "Each real anneal predicted from the others of its run; and from those alone that had ended by then.",
        "",
        "| predictor | mean absolute error | anneals | from earlier ones alone | anneals |",
        "|---|---|---|---|---|",
    ]
    for name, label in PREDICTORS.items():
        cells = []
        for key in ("errors", "errors_earlier_only"):
            errors = [
                abs(e) for seed in study.config.seeds for e in results[f"forecast-{seed}"][key].get(name, {}).values()
            ]
            cells += [f"{fmean(errors):.4f}" if errors else "-", str(len(errors))]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return [*lines, ""]


def _spikes(study: Study, results: Results) -> list[str]:
    if study.config.spikes is None:
        return []
    lines = [
        "## Spike recovery",
        "",
        f"Recovered: a held-out loss at the end at most {TOLERANCE} nats above that of the run without the fault.",
        "",
        "| fault | arm | recovered | excess loss, median | tokens in vain, median |",
        "|---|---|---|---|---|",
    ]
    rows = [row for seed in study.config.seeds for row in results[f"spikes-{seed}"]["cases"]]
    lines += [
        f"| {row['fault']} | {row['arm']} | {row['recovered']} of {row['runs']} | {_loss(row['excess_loss_median'])} | {row['tokens_in_vain_median']:,.0f} |"
        for row in table(rows)
    ]
    return [*lines, ""]


def _loss(value: float) -> str:
    return f"{value:+.4f}" if math.isfinite(value) else "gave up"


def _how(study: Study, records: Mapping[str, StepRecord]) -> list[str]:
    seconds: dict[str, float] = {}
    for name, record in records.items():
        kind = name.rpartition("-")[0]
        seconds[kind] = seconds.get(kind, 0.0) + record.seconds
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "ray", "transformers", "numpy"))
    return [
        "## To repeat it",
        "",
        "```sh",
        f"pma study --config {study.config.name.removesuffix('-quick')}{' --quick' if study.config.name.endswith('-quick') else ''}",
        "```",
        "",
        (
            f"pmaflow {code_version()}, Python {platform.python_version()}, {libraries}; {os.cpu_count()} CPU cores. All figures: "
            f"[figures.json]({study.config.name}/figures.json)."
        ),
        "",
        "| step | seconds, all seeds |",
        "|---|---|",
        *(f"| {kind} | {value:,.0f} |" for kind, value in seconds.items()),
        f"| together | {sum(seconds.values()):,.0f} |",
        "",
        "The configuration:",
        "",
        "```yaml",
        yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(study.config))), sort_keys=False).rstrip(),
        "```",
    ]
