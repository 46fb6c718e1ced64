"""The whole story on the embedded default: train, merge, anneal, compare, report."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

from configs.schema import Config
from pipelines.anneal import anneal, branch_name, fork_step
from pipelines.compare import compare_windows, missing_comparisons
from pipelines.pretrain import continue_run, has_work_left, prepare_run, working_session
from pipelines.report.build import write_report
from tasks.checkpoints.run_folder import RunFolder
from tasks.evaluation.held_out import Evaluation, read_evaluation, suite_of
from tasks.merging.schedule import scheduled_rule


def demo(run_url: str, config: Config) -> dict[str, Any]:
    """Pre-train, fork an annealing branch with the same token budget, compare, write the report.

    Returns the fields of ``pma demo --json``. The same call again continues where it stopped.
    """
    started = time.perf_counter()
    fork = fork_step(config)
    run = prepare_run(run_url, config)
    with ExitStack() as stack:
        if has_demo_work_left(run, config, fork):
            stack.enter_context(working_session(run, config))
        continue_run(run, config)
        anneal(run_url, fork)
        compare_windows(run, config)
    report = write_report(run_url)
    return {**compare(run, config, fork), "report": report, "seconds": round(time.perf_counter() - started, 3)}


def has_demo_work_left(run: RunFolder, config: Config, fork: int) -> bool:
    """Whether any worker is needed: one Ray session then serves all stages."""
    branch = run.branch(branch_name(fork))
    return has_work_left(run, config) or not branch.snapshots() or bool(missing_comparisons(run, config))


def compare(run: RunFolder, config: Config, fork: int) -> dict[str, Any]:
    """The comparison that the paper makes: the raw end of the stable phase, its merge, and a real anneal."""
    raw_snapshot = run.snapshots()[-1]
    branch = run.branch(branch_name(fork))
    annealed_snapshot = branch.snapshots()[-1]
    raw = evaluation_of(run, config, raw_snapshot.manifest.digest)
    annealed = evaluation_of(branch, branch.identity().config, annealed_snapshot.manifest.digest)
    name = scheduled_rule(config).name_at(raw_snapshot.manifest)
    merged_manifest = run.merged().get(name)
    merged = evaluation_of(run, config, merged_manifest.digest) if merged_manifest else None
    return {
        "run": run.url,
        "raw_loss": raw.loss if raw else None,
        "merged_loss": merged.loss if merged else None,
        "annealed_loss": annealed.loss if annealed else None,
        # What was known of annealing before it was done: no anneal to calibrate with, so the merge as it is.
        "forecast_loss": merged.loss if merged else None,
        "raw_slices": list(raw.slices) if raw else None,
        "merged_slices": list(merged.slices) if merged else None,
        "annealed_slices": list(annealed.slices) if annealed else None,
        "spread": raw.spread if raw else None,
        "raw_snapshot": raw_snapshot.url,
        "merged": f"{run.url}/merged/{name}" if merged_manifest else None,
        "annealed_snapshot": annealed_snapshot.url,
    }


def evaluation_of(run: RunFolder, config: Config, digest: str) -> Evaluation | None:
    """Held-out loss of the weights ``digest``, if it was measured."""
    return read_evaluation(run.store, digest, suite_of(config))
