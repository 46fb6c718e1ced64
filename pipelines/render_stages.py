"""What continued training and SFT print for people."""

from __future__ import annotations

from typing import Any

from pipelines.render import render_training
from pipelines.wording import format_loss

LINES = {
    "initial_loss": "held-out loss at the start",
    "final_loss": "held-out loss at the end",
    "held_out_loss": "held-out loss over the run",
    "training_loss": "training loss over the run",
    "gradient_norm": "gradient norm",
    "gradient_variance": "gradient-norm variance",
    "num_spikes": "spikes",
    "num_excursions": "steps that stand out",
}
"""Quantities of a comparison in the order that they are printed, and what they are called."""
PAIRED = {"slices": "held-out slices", "blocks": "blocks of steps", "seeds": "seeds"}


def render_stage(result: dict[str, Any]) -> str:
    """The result of a stage for people."""
    lines = []
    for row in result["seeds"]:
        of_seed = f"seed {row['seed']}, " if len(result["seeds"]) > 1 else ""
        for name, arm in (("init", row), ("control", row["control"])):
            if arm is not None:
                lines += [f"{of_seed}{name} {arm['init']['url']}, held-out {format_loss(arm['init']['loss'])}"]
                lines += [f"  {line}" for line in render_training(arm).splitlines()]
    return "\n".join([*lines, *(render_comparison(result["comparison"]) if result["comparison"] else [])])


def render_comparison(comparison: dict[str, Any]) -> list[str]:
    """What the arms differ by, a line a quantity: over seeds where there are several, else of the one seed."""
    differences = comparison["over_seeds"] or comparison["seeds"][0]["differences"]
    names = [*LINES, *sorted(name for name in differences if name not in LINES)]
    lines = [f"init less control, intervals of {comparison['confidence']:.0%}:"]
    return [*lines, *(f"  {_line(name, differences[name])}" for name in names if name in differences)]


def _line(name: str, found: dict[str, Any]) -> str:
    label = LINES.get(name) or f"held-out loss at the end, {name.rpartition('/')[2]}"
    if found["is_ratio"]:
        size, interval = f"{found['mean']:.3f} times the control's", _interval(found, ".3f")
    elif name.startswith("num_"):
        size, interval = f"{found['mean']:+.3g}", _interval(found, "+.3g")
    else:
        size, interval = f"{found['mean']:+.4f}", _interval(found, "+.4f")
    verdict = {-1: "lower", 0: "no difference to be told", 1: "higher"}[found["sign"]]
    return f"{label}: {size}{interval}{f', {verdict}' if interval else ''}"


def _interval(found: dict[str, Any], form: str) -> str:
    if found["low"] is None:
        return ""
    return f" ({found['low']:{form}} to {found['high']:{form}} over {found['num']} {PAIRED[found['over']]})"
