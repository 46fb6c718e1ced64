"""The end-of-run table: merges of each N and of each method at the last step, made and evaluated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from configs.schema import Config
from pipelines.driven import Driven
from pipelines.pretrain import pretrain_steps
from pipelines.run_lease import hold_run
from pipelines.scheduled import evaluate_all, make_merges, on_ray, unevaluated
from pipelines.steps import Step, Unit, pending_steps, run_steps
from pipelines.timing import timed
from pipelines.units import expected_snapshots, model_bytes
from tasks.checkpoints.run_folder import RunFolder, Snapshot
from tasks.evaluation.held_out import suite_of
from tasks.merging.schedule import DueMerge, scheduled_rule
from tasks.merging.selection import Placed, WindowRule, due_windows


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
        if (name := rule.output_name(snapshots[-1].step, snapshots[-1].recovery)) not in merged
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
    look = driven.run.look()
    done, size = look.merged(), model_bytes(driven, look)
    expected = expected_snapshots(driven, look)
    rules = [rule for rule in comparison_rules(driven.config) if windows_at_end(expected, rule)]
    last = expected[-1] if expected else None
    names = {rule.output_name(last.step, last.recovery): rule.count for rule in rules if last}
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
        outcome = make_merges(run, config, missing_comparisons(run, config), on_ray(config))
        if outcome.failed:
            raise next(iter(outcome.failed.values()))
        evaluate_all(run, config, unevaluated(run, config), lambda: False, batch=2)
    return {"merges": [unit.name for unit in comparison_units(driven) if unit.is_done]}


def _lacks_comparison(driven: Driven) -> bool:
    return bool(missing_comparisons(driven.run, driven.config) or unevaluated(driven.run, driven.config))
