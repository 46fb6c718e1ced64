"""What `pma recover` prints."""

from __future__ import annotations

from typing import Any


def render_recovery(result: dict[str, Any]) -> str:
    """The decision in a few lines, and what to type next."""
    steps = ", ".join(f"{row['step']:,}" for row in result["inputs"])
    many = len(result["inputs"]) > 1
    lines = [
        result["reason"],
        (
            f"{'would go' if result['dry_run'] else 'goes'} on from {'the mean of steps' if many else 'step'} {steps}, moments "
            f"{result['moments']}, learning rate x{result['learning_rate_scale']:g} re-warmed over "
            f"{result['rewarm_tokens']:,} tokens, {result['skipped_sequences']:,} sequences of data skipped"
        ),
    ]
    if not result["dry_run"]:
        lines.append(
            f"recovery {result['recovery']} is on record; the run's own pma pretrain command continues from it"
        )
    return "\n".join(lines)
