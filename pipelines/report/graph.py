"""The pipeline's steps as a drawing: done, due or blocked, and how many of their pieces are committed."""

from __future__ import annotations

import html
from typing import Any

from pipelines.anneal import branch_name
from pipelines.plan import plan
from pipelines.report.data import ReportData
from tasks.checkpoints.run_folder import RunFolder


def draw_steps(data: ReportData) -> str:
    """The step graph as HTML with its Mermaid text; empty for a run that no pipeline of ours drove."""
    run = RunFolder(data.url)
    if not run.store.keys("steps"):
        return ""
    # The plan knows every pipeline, and the demo writes this report.
    answer = plan("demo" if data.branches and _ends_as_demo(data) else "pretrain", data.config, data.url)
    boxes = "".join(_box(row) for row in answer["steps"])
    mermaid = html.escape(answer["mermaid"])
    return f'<ul class="steps">{boxes}</ul><details><summary>As Mermaid text</summary><pre>{mermaid}</pre></details>'


def _ends_as_demo(data: ReportData) -> bool:
    """Whether the branches are the demo's: an annealing branch that ends where the trunk does."""
    fork_tokens = data.config.training.total_tokens - data.config.anneal.tokens
    return branch_name(fork_tokens // data.config.training.batch_tokens) in data.branches


def _box(row: dict[str, Any]) -> str:
    pieces = f"{row['units_done']:,} of {row['units']:,}" if row["units"] else ""
    after = f"after {', '.join(row['needs'])}" if row["needs"] else ""
    return (
        f'<li class="step {row["state"]}"><b>{html.escape(row["step"])}</b><span>{row["state"]} {pieces}</span>'
        f"<small>{html.escape(after)}</small></li>"
    )
