"""The whole story on the embedded default: train, merge, anneal, compare, report."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

from configs.errors import UserError
from configs.schema import Config
from pipelines.anneal import anneal, branch_name
from pipelines.forecast import evaluation_of, forecast_at
from pipelines.pretrain import continue_run, has_work_left, hold_run, prepare_run, working_session
from pipelines.report.build import write_report
from pipelines.scheduled import evaluate_all, make_merges, on_ray, unevaluated
from pipelines.timing import timed
from tasks.checkpoints.run_folder import RunFolder, Snapshot
from tasks.merging.schedule import DueMerge, scheduled_rule
from tasks.merging.selection import WindowRule, select_window


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


def fork_step(config: Config) -> int:
    """Snapshot from which the branch ends exactly where the trunk ends."""
    fork_tokens = config.training.total_tokens - config.anneal.tokens
    if fork_tokens % config.snapshots.interval_tokens or fork_tokens < config.schedule.warmup_tokens:
        raise UserError(
            f"the demo forks its annealing branch at training.total_tokens - anneal.tokens = {fork_tokens} tokens: that must "
            f"be a snapshot (a multiple of snapshots.interval_tokens={config.snapshots.interval_tokens}) after warmup"
        )
    if config.schedule.decay_tokens:
        raise UserError("the demo compares annealing with a constant learning rate: set schedule.decay_tokens=0")
    return fork_tokens // config.training.batch_tokens


def comparison_rules(config: Config) -> list[WindowRule]:
    """Merges of the end-of-run table: each N with the configured method, and each method with the configured N."""
    base = scheduled_rule(config)
    rules = [
        WindowRule(method=base.method, count=n, interval_tokens=base.interval_tokens, alpha=base.alpha)
        for n in config.merge.comparison_counts
    ]
    for method in ("sma", "wma", "ema"):
        alpha = config.merge.alpha if method == "ema" else None
        rules.append(WindowRule(method=method, count=base.count, interval_tokens=base.interval_tokens, alpha=alpha))
    return list(dict.fromkeys([*rules, base]))


def missing_comparisons(run: RunFolder, config: Config) -> list[DueMerge[Snapshot]]:
    """Merges of the table that can be made at the last step and are not made yet."""
    snapshots, merged = run.snapshots(), run.merged()
    missing = []
    for rule in comparison_rules(config):
        if snapshots and (name := rule.output_name(snapshots[-1].step)) not in merged:
            try:
                missing.append(DueMerge(name=name, rule=rule, window=select_window(snapshots, rule)))
            except UserError:
                continue
    return missing


def compare_windows(run: RunFolder, config: Config) -> None:
    """Make and evaluate the merges of the table at the last step, where there are enough snapshots."""
    missing = missing_comparisons(run, config)
    if not missing and not unevaluated(run, config):
        return
    with hold_run(run), timed(run.store, "comparison of N and methods", "evidence"):
        make_merges(run, config, missing, on_ray(config, lambda: False))
        evaluate_all(run, config, unevaluated(run, config), lambda: False, batch=2)


def compare(run: RunFolder, config: Config, fork: int) -> dict[str, Any]:
    """The comparison that the paper makes: the raw end of the stable phase, its merge, and a real anneal."""
    raw_snapshot = run.snapshots()[-1]
    branch = run.branch(branch_name(fork))
    annealed_snapshot = branch.snapshots()[-1]
    raw = evaluation_of(run, config, raw_snapshot.manifest.digest)
    annealed = evaluation_of(branch, branch.identity().config, annealed_snapshot.manifest.digest)
    forecast = forecast_at(run, config, raw_snapshot.step)
    name = scheduled_rule(config).name_at(raw_snapshot.manifest)
    merged_manifest = run.merged().get(name)
    merged = evaluation_of(run, config, merged_manifest.digest) if merged_manifest else None
    return {
        "run": run.url,
        "raw_loss": raw.loss if raw else None,
        "merged_loss": merged.loss if merged else None,
        "annealed_loss": annealed.loss if annealed else None,
        "forecast_loss": forecast.loss if forecast else None,
        "raw_slices": list(raw.slices) if raw else None,
        "merged_slices": list(merged.slices) if merged else None,
        "annealed_slices": list(annealed.slices) if annealed else None,
        "spread": raw.spread if raw else None,
        "raw_snapshot": raw_snapshot.url,
        "merged": f"{run.url}/merged/{name}" if merged_manifest else None,
        "annealed_snapshot": annealed_snapshot.url,
    }
