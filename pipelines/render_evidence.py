"""What the commands about evidence print for people."""

from __future__ import annotations

from typing import Any

PREDICTORS = {
    "raw": "the raw snapshot, as it is",
    "merged": "the merge, as it is",
    "merged_with_offset": "the merge and the offset of real anneals",
    "law": "the law of loss and learning rate",
    "combined": "the mean of the last two",
}


def render_forecast(result: dict[str, Any]) -> str:
    """A forecast: the answer, what each predictor says and how far off it was, and what is not known."""
    what = f"an anneal over {result['anneal_tokens']:,} tokens that ends at step {result['step']:,}"
    if result["forecast_loss"] is None:
        lines = [f"{what}: nothing to forecast from"]
    else:
        interval = result["interval"]
        width = f", {result['interval_level']:.0%} interval {interval[0]:.4f} to {interval[1]:.4f}" if interval else ""
        lines = [f"{what}: held-out loss {result['forecast_loss']:.4f}{width}"]
    lines.append(f"  {'predictor':<42}{'says':>8}   mean error on real anneals, each from the others")
    for name, label in PREDICTORS.items():
        test = result["back_test"].get(name)
        off = f"{test['mean_absolute_error']:.4f} over {test['anneals']}" if test else "-"
        said = result["predictors"].get(name)
        lines.append(f"  {label:<42}{'-' if said is None else format(said, '.4f'):>8}   {off}")
    return "\n".join([*lines, *(f"not known: {reason}" for reason in result["cannot_know"])])
