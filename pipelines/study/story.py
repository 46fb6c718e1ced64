"""The paper's experiments as a story: do what is lacking, judge every finding, write the page."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from cluster.lease import hold_lease
from cluster.session import ray_session
from cluster.storage import open_store
from configs.json_numbers import finite_or_none
from configs.study import StudyConfig
from pipelines.pretrain import num_cpus
from pipelines.steps import pending_steps, run_steps
from pipelines.study.findings import judge
from pipelines.study.layout import Study
from pipelines.study.page import write_page
from pipelines.study.require import require_study
from pipelines.study.steps import TRAINING, study_steps
from tasks.evaluation.verdicts import Finding

LEASE = "study"
Tell = Callable[[str], None]


def study(url: str, config: StudyConfig, *, output: str | None = None, tell: Tell = lambda _: None) -> dict[str, Any]:
    """Do what the study at ``url`` still lacks, judge every finding, and write the page to ``output`` (default: below it).

    The same call again continues it. Returns the fields of ``pma study --json``. Raises
    :class:`configs.errors.UserError` for what is wrong with the configuration before anything is trained, and
    :class:`cluster.errors.LeaseHeld` if somebody else is at work on it.
    """
    started = time.perf_counter()
    place = Study(url=open_store(url).url, config=config)
    require_study(place)
    steps = study_steps(place)
    with hold_lease(place.store, LEASE) as lease, ExitStack() as stack:
        place = replace(place, lease=lease)
        if any(step.name.split("-")[0] in TRAINING for step in pending_steps(place.store, steps, place)):
            cpus = max(num_cpus(place.trunk_config(seed)) for seed in config.seeds)
            stack.enter_context(ray_session(place.trunk_config(config.seeds[0]).cluster.address, cpus))
        records = run_steps(place.store, steps, place, lease, tell)
    findings = judge(place, {name: record.result for name, record in records.items()})
    page = write_page(place, records, findings, output or f"{place.url}/page")
    return {
        "study": place.url,
        "page": page,
        "findings": finite_or_none([_describe(finding) for finding in findings]),
        "step_seconds": {name: record.seconds for name, record in records.items()},
        "seconds": round(time.perf_counter() - started, 3),
    }


def _describe(finding: Finding) -> dict[str, Any]:
    return {
        "name": finding.name,
        "source": finding.source,
        "finding": finding.text,
        "verdict": finding.verdict,
        "claims": [
            {
                "text": claim.text,
                "rule": claim.rule,
                "values": list(claim.values),
                "mean": claim.interval.mean if claim.interval else None,
                "interval": [claim.interval.low, claim.interval.high] if claim.interval else None,
                "unit": claim.unit,
                "verdict": claim.verdict,
            }
            for claim in finding.claims
        ],
        "remark": finding.remark,
    }
