"""What the commands print for people; ``--json`` prints the same fields for scripts."""

from __future__ import annotations

import json
import time
from typing import Any

from pipelines.wording import describe_event, format_loss, format_seconds


def render_demo(result: dict[str, Any]) -> str:
    """The demo's result for people."""
    rows = [
        ("raw snapshot", "raw_loss"),
        ("merged", "merged_loss"),
        ("annealed", "annealed_loss"),
        ("forecast", "forecast_loss"),
    ]
    lines = ["held-out loss at the end, nats per byte"]
    lines += [
        f"  {label:<13}{result[key]:.4f}" if result[key] is not None else f"  {label:<13}not measured"
        for label, key in rows
    ]
    return "\n".join([*lines, f"done in {result['seconds']:.0f} s", f"report: {result['report']}"])


def render_training(result: dict[str, Any]) -> str:
    """A training result for people."""
    loss = f", loss {result['loss']:.4f}" if result["loss"] is not None else ""
    return (
        f"{result['run']}: step {result['final_step']:,}, {result['tokens_seen']:,} tokens{loss}, "
        f"{len(result['segments'])} segment(s), {result['seconds']:.0f} s\nfinal snapshot: {result['final_snapshot']}"
    )


def render_merge(result: dict[str, Any]) -> str:
    """A merge, a grid of them, or a plan for people."""
    lines = [f"note: {note}" for note in result["notes"]]
    for one in result.get("merges", [result]):
        lines += _render_one_merge(one)
    report = result.get("moe_report")
    if report is not None:
        lines += [_render_drift(row) for row in report["layers"]]
        lines += [f"warning: {warning}" for warning in report["warnings"]]
        lines += [] if report["layers"] else ["no experts: nothing for the MoE report to say"]
    return "\n".join(lines)


def _render_one_merge(result: dict[str, Any]) -> list[str]:
    lines = [
        f"{result['method']} of {len(result['inputs'])} checkpoints, {result['tasks']} tasks -> {result['output']}"
    ]
    for row in result.get("plan", []):
        lines.append(
            f"  task {row['task']}: reads {row['bytes_read']:,} B, writes {row['bytes_written']:,} B, "
            f"needs {row['memory_bytes'] >> 20} MiB: {', '.join(row['parameter_groups'])}"
        )
    if result["digest"]:
        lines.append(f"digest {result['digest']}")
        lines.append(
            f"read {result['bytes_read']:,} B, wrote {result['bytes_written']:,} B in {result['seconds']:.2f} s"
        )
    return lines


def _render_drift(row: dict[str, Any]) -> str:
    steps = ", ".join(
        f"{mean:.4f} (expert {expert}: {most:.4f})"
        for mean, most, expert in zip(row["drift_mean"], row["drift_max"], row["drift_max_expert"], strict=True)
    )
    return f"  {row['layer']}: {row['experts']} experts, drift from input to input {steps}"


def render_adoption(result: dict[str, Any]) -> str:
    """What was adopted, for people."""
    lines = [f"step {row['step']:>9,}  {row['digest'][:12]}  {row['source']}" for row in result["adopted"]]
    known = f", {len(result['known'])} were known" if result["known"] else ""
    return "\n".join([*lines, f"{result['run']}: adopted {len(result['adopted'])}{known}"])


def render_export(result: dict[str, Any]) -> str:
    """An export for people."""
    lines = [f"{result['url']} -> {result['output']} ({result['format']}), {result['bytes_written']:,} B"]
    lines += [f"tied, written once: {name}" for name in result["tied"]]
    return "\n".join([*lines, *(f"note: {note}" for note in result["notes"]), f"digest {result['digest']}"])


def render_evaluation(result: dict[str, Any]) -> str:
    """Held-out losses and scores of tasks for people."""
    lines = []
    for row in result["results"]:
        lines.append(f"{'not measured' if 'digest' not in row else format_loss(row['loss'])}  {row['url']}")
        for task, scores in row.get("tasks", {}).items():
            values = [f"{name} {format_loss(scores[name])}" + _error_of(scores, name) for name in _metrics(scores)]
            lines.append(f"        {task}: {', '.join(values)}")
        lines += [f"        FAILED: {row['error']}"] if "error" in row else []
    return "\n".join(lines) or "nothing lacks a record"


def _metrics(scores: dict[str, Any]) -> list[str]:
    return [name for name in scores if "_stderr" not in name]


def _error_of(scores: dict[str, Any], name: str) -> str:
    metric, _, filtered = name.partition(",")
    error = scores.get(f"{metric}_stderr,{filtered}" if filtered else f"{metric}_stderr")
    return "" if error is None else f" ± {error:.4f}"


def render_verification(result: dict[str, Any]) -> str:
    """A verification for people."""
    words = {True: "holds", False: "FAILS"}
    lines = [
        f"{'      ' if check.get('skipped') else words[check['ok']]:<6}{name}"
        + (f": not checked, {check['reason']}" if check.get("skipped") else "")
        for name, check in result["checks"].items()
    ]
    lines += [f"  {problem}" for problem in result["problems"]]
    return "\n".join(
        [*lines, f"{result['url']}: {'verified' if result['ok'] else 'NOT as stated'}, digest {result['digest']}"]
    )


def render_status(result: dict[str, Any]) -> str:
    """A run's state for people."""
    snapshots = result["snapshots"]
    last = f"step {snapshots[-1]['step']:,} of {result['total_steps']:,}" if snapshots else "nothing committed yet"
    lines = [
        f"{result['run']}: {last}",
        f"snapshots {len(snapshots)}, merged {len(result['merged'])}, merges due {len(result['due'])}",
    ]
    lines += [
        f"  {s['step']:>9,}  {s['phase'] or '':<7} {'healthy' if s['healthy'] else 'UNHEALTHY'}  "
        + (f"held-out {format_loss(s['loss'])}" if s["evaluated"] else "")
        for s in snapshots[-8:]
    ]
    lines += [
        f"segment {s['segment']}: {s['cause']}, from step {s['start']['step']:,}, {s['end']['reason'] if s['end'] else 'open'}"
        for s in result["segments"][-5:]
    ]
    lines += [
        f"lease {row['name']}: {row['owner']}, for {format_seconds(row['age_seconds'])}, expires in {row['expires_in_seconds']} s"
        for row in result["leases"]
    ]
    left = len(result["left_behind"]), len(result["left_behind_merges"])
    lines += [f"left behind by a recovery: snapshots {left[0]}, merged {left[1]}"] if any(left) else []
    lines += [f"due {name}" for name in result["due"][:5]]
    lines += [f"... and {len(result['due']) - 5} more due"] if len(result["due"]) > 5 else []
    lines += [f"branch {name}" for name in result["branches"]]
    lines += [
        f"{time.strftime('%m-%d %H:%M:%S', time.localtime(event['time']))} {describe_event(event)}"
        for event in result["events"]
    ]
    tracking = result["tracking"]
    lines.append(
        f"tracking {tracking['uri'] or 'off'}: {tracking['lag']} item(s) behind{': ' + tracking['error'] if tracking['error'] else ''}"
    )
    lines += [
        f"model {row['model']}: {row['alias']} {'moved to' if row['moved'] else 'did not move to'} version {row['version']}: {row['reason']}"
        for row in tracking.get("promotions", [])[-3:]
    ]
    return "\n".join(lines)


def render_config(result: dict[str, Any]) -> str:
    """A resolved configuration for people."""

    def rows(values: dict[str, Any], prefix: str) -> list[tuple[str, str]]:
        found: list[tuple[str, str]] = []
        for key, value in values.items():
            found += (
                rows(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", json.dumps(value))]
            )
        return found

    listed = rows(result["config"], "")
    width = max(len(f"{key}={value}") for key, value in listed if len(value) < 40)
    return "\n".join(f"{f'{key}={value}':<{width}}  # {result['origins'][key]}" for key, value in listed)
