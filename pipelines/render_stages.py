"""What continued training and SFT print for people."""

from __future__ import annotations

from typing import Any

from pipelines.render import render_training


def render_stage(result: dict[str, Any]) -> str:
    """The result of a stage for people."""
    return "\n".join([f"init {result['init']['url']}", render_training(result)])
