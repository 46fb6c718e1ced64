"""What plan, tick and watch print for people."""

from __future__ import annotations

from typing import Any

from pipelines.wording import format_bytes, format_seconds


def render_plan(result: dict[str, Any]) -> str:
    """The steps of a pipeline, a line each."""
    rows = [("step", "state", "pieces", "reads", "writes", "time")]
    for row in result["steps"]:
        pieces = f"{row['units_done']:,} of {row['units']:,}" if row["units"] else "-"
        seconds = "not measured yet" if row["seconds"] is None else format_seconds(row["seconds"])
        sizes = (format_bytes(row["bytes_read"]), format_bytes(row["bytes_written"]))
        rows.append((f"{row['step']}@{row['version']}", row["state"], pieces, *sizes, seconds))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([f"{result['pipeline']} of {result['run']}", *lines])


def render_tick(result: dict[str, Any]) -> str:
    """What a tick did, a line each."""
    lines = [f"adopted step {row['step']:,} from {row['source']}" for row in result["adopted"]]
    lines += [f"waiting for {row['url']}: {row['reason']}" for row in result["waiting"]]
    lines += [f"merged {url}" for url in result["merged"]]
    lines += [f"FAILED {row['name']}: {row['reason']}" for row in result["failed"]]
    lines += [f"evaluated {url}" for url in result["evaluated"]]
    return "\n".join(lines + ([result["skipped"]] if result["skipped"] else []))


def render_watch(result: dict[str, Any]) -> str:
    """What all rounds of a watch made."""
    return f"{len(result['merged'])} merges made in {result['rounds']} rounds on {result['run']}"
