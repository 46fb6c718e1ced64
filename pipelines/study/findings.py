"""The findings of the paper, judged on a study's figures."""

from __future__ import annotations

from statistics import fmean

from pipelines.study.figures import Results, stable_gains
from pipelines.study.layout import Study
from pipelines.study.merging_findings import (
    MARGIN,
    decay_curves,
    fork_test,
    inside_anneal,
    merge_interval,
    merge_span,
    methods_early,
    methods_late,
    simulator,
    snapshot_count,
    stable_phase,
)
from pipelines.study.other_findings import continued, contour, hessian, sft, spikes
from tasks.evaluation.verdicts import Finding


def judge(study: Study, results: Results) -> list[Finding]:
    """Every finding, judged on what was measured."""
    margin = margin_of(study, results)
    findings = [
        stable_phase(study, results),
        inside_anneal(study, results, margin),
        fork_test(study, results, margin),
        simulator(study, results, margin),
        methods_early(study, results),
        methods_late(study, results),
        merge_interval(study, results),
        snapshot_count(study, results),
        merge_span(study, results),
        decay_curves(study, results),
        hessian(study, results),
        contour(study, results),
    ]
    if study.config.continued:
        findings.append(continued(study, results, margin))
    if study.config.sft:
        findings.append(sft(study, results))
    if study.config.spikes:
        findings.append(spikes(study, results))
    return findings


def margin_of(study: Study, results: Results) -> float:
    """Nats that count as no difference."""
    return MARGIN * fmean(stable_gains(study, results, study.config.grid.ends[-1]))
