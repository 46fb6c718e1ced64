"""The whole story on the embedded default: train, merge, anneal, compare, report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any

from configs.errors import UserError
from configs.schema import Config
from pipelines.anneal import anneal, branch_name
from pipelines.driven import Driven
from pipelines.forecast import evaluation_of, forecast_at
from pipelines.pretrain import continue_run, has_work_left, hold_run, prepare_run, pretrain_steps, working_session
from pipelines.report.build import write_report
from pipelines.scheduled import evaluate_all, make_merges, on_ray, unevaluated
from pipelines.steps import Step, Unit, pending_steps, run_steps
from pipelines.timing import timed
from pipelines.units import expected_snapshots, model_bytes
from tasks.checkpoints.run_folder import RunFolder, Snapshot
from tasks.evaluation.held_out import suite_of
from tasks.merging.schedule import DueMerge, scheduled_rule
from tasks.merging.selection import Placed, WindowRule, due_windows


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


def compare_step(config: Config) -> Step[Driven]:
    """The merges of the end-of-run table, made and evaluated."""
    return Step(
        name="compare",
        config={"rules": [asdict(rule) for rule in comparison_rules(config)], "suite": suite_of(config)},
        needs=("train",),
        function=_compare,
        units=comparison_units,
        is_standing=lambda driven, _: not _lacks_comparison(driven),
    )


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
    return list(dict.fromkeys([*rules, replace(base, max_span_fraction=None)]))


def missing_comparisons(run: RunFolder, config: Config) -> list[DueMerge[Snapshot]]:
    """Merges of the table that can be made at the last step and are not made yet."""
    snapshots, merged = run.snapshots(), run.merged()
    return [
        DueMerge(name=name, rule=rule, window=window)
        for rule in comparison_rules(config)
        for window in (windows_at_end(snapshots, rule) if snapshots else [])
        if (name := rule.output_name(snapshots[-1].step)) not in merged
    ]


def compare_windows(run: RunFolder, config: Config) -> None:
    """Make and evaluate the merges of the table at the last step, where there are enough snapshots."""
    driven = Driven(run=run, config=config)
    train, *_ = pretrain_steps(config)
    steps = [train, compare_step(config)]
    if pending_steps(run.store, steps, driven):
        with hold_run(run) as lease:
            run_steps(run.store, steps, replace(driven, lease=lease), lease)


def comparison_units(driven: Driven) -> list[Unit]:
    """The merges of the table that the last step will have snapshots for."""
    done, size = driven.run.merged(), model_bytes(driven)
    expected = expected_snapshots(driven)
    rules = [rule for rule in comparison_rules(driven.config) if windows_at_end(expected, rule)]
    names = {rule.output_name(expected[-1].step): rule.count for rule in rules}
    return [
        Unit(name=name, is_done=name in done, bytes_read=count * size, bytes_written=size)
        for name, count in names.items()
    ]


def windows_at_end(snapshots: Sequence[Placed], rule: WindowRule) -> list[list[Placed]]:
    """The window of ``rule`` that ends at the last of ``snapshots``, if it is complete."""
    return [window for window in due_windows(snapshots, rule, ()) if window[-1].step == snapshots[-1].step]


def _compare(driven: Driven) -> dict[str, Any]:
    run, config = driven.run, driven.config
    with timed(run.store, "comparison of N and methods", "evidence"):
        outcome = make_merges(run, config, missing_comparisons(run, config), on_ray(config, lambda: False))
        if outcome.failed:
            raise next(iter(outcome.failed.values()))
        evaluate_all(run, config, unevaluated(run, config), lambda: False, batch=2)
    return {"merges": [unit.name for unit in comparison_units(driven) if unit.is_done]}


def _lacks_comparison(driven: Driven) -> bool:
    return bool(missing_comparisons(driven.run, driven.config) or unevaluated(driven.run, driven.config))


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
