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


def render_rebuild(result: dict[str, Any]) -> str:
    """A merge made again: whether it is the same, then from what."""
    what = f"{result['model']} version {result['version']}"
    lines = [f"input {item['digest'][:16]}  {item['url']}" for item in result["inputs"]]
    lines += [f"digest {result['digest']}", f"on record {result['expected_digest']}"]
    if result["ok"]:
        how = f"made again in {result['seconds']:.2f} s" if result["is_new"] else "stands already"
        return "\n".join([f"{what}: {how}, as recorded -> {result['output']}", *lines])
    if result["digest"] == result["expected_digest"]:
        lines += [f"state {result['state_digest']}", f"on record {result['expected_state_digest']}"]
    fate = "taken away again" if result["taken_away"] else f"at {result['output']}"
    return "\n".join([f"{what}: NOT as recorded, {fate}", *lines])


def render_ablation(result: dict[str, Any]) -> str:
    """A grid of merges: what to choose first, then N by V for each method, then what could not be made."""
    lines = []
    for end in result["ends"]:
        chosen = end["recommended"]
        raw = f", raw {end['raw_loss']:.4f}" if end["raw_loss"] is not None else ""
        lines.append(
            f"step {end['step']:,}{raw}: take {chosen['method'].upper()}, N {chosen['count']}, V "
            f"{chosen['interval_tokens']:,} tokens ({end['chosen']}); lowest loss: {end['best']}; "
            f"{len(end['not_told_apart']) - 1} others are not told apart from it"
        )
        cells = [cell for cell in result["cells"] if cell["end_step"] == end["step"]]
        for label in dict.fromkeys(_label(cell) for cell in cells):
            lines += _render_table(label, [cell for cell in cells if _label(cell) == label])
    lines += [f"not made: {row['name']}: {row['reason']}" for row in result["lacking"][:5]]
    lines += [f"... and {len(result['lacking']) - 5} more not made"] if len(result["lacking"]) > 5 else []
    lines += _render_scaling(result["scaling"]) if "scaling" in result else []
    return "\n".join([*lines, f"{len(result['cells'])} merges in {result['seconds']:.0f} s: {result['record']}"])


def render_study(result: dict[str, Any]) -> str:
    """A study: each finding with its verdict, then where the page is."""
    width = max(len(finding["name"]) for finding in result["findings"])
    lines = [f"{finding['name']:<{width}}  {finding['verdict']}" for finding in result["findings"]]
    return "\n".join([*lines, f"the page: {result['page']}"])


def _label(cell: dict[str, Any]) -> str:
    return f"EMA {cell['alpha']:g}" if cell["method"] == "ema" else str(cell["method"]).upper()


def _render_scaling(scaling: dict[str, Any]) -> list[str]:
    lines = ["best V by active parameters:"]
    for run in scaling["runs"]:
        edge = ", at the edge of what was tried" if run["is_at_the_edge"] else ""
        others = [f"{v:,}" for v in run["not_told_apart"] if v != run["interval_tokens"]]
        same = f", not told apart from {', '.join(others)}" if others else ""
        lines.append(
            f"  {run['active_parameters']:>14,}  V {run['interval_tokens']:,} (N {run['count']}{edge}{same}): {run['run']}"
        )
    fit = scaling["fit"]
    if fit is None:
        lines.append(f"  {scaling['cannot_know']}")
    else:
        interval = fit["exponent_interval"]
        width = f" ({interval[0]:.2f} to {interval[1]:.2f})" if interval else f" ({fit['points']} points: no interval)"
        lines.append(f"  V grows with size to the power of {fit['exponent']:.2f}{width}")
    paper = {name: scaling["paper"][name]["fit"]["exponent"] for name in ("moe", "dense")}
    lines.append(
        f"  the paper's choices: {paper['moe']:.2f} for its MoE models, {paper['dense']:.2f} for its dense ones"
    )
    return lines


def _render_table(label: str, cells: list[dict[str, Any]]) -> list[str]:
    losses = {(cell["count"], cell["interval_tokens"]): cell["loss"] for cell in cells}
    intervals = sorted({interval for _, interval in losses})
    head = f"  {label:<9}" + "".join(f"{f'V {interval:,}':>14}" for interval in intervals)
    rows = [
        f"  N {count:<7}"
        + "".join(
            f"{losses[count, interval]:>14.4f}" if (count, interval) in losses else f"{'-':>14}"
            for interval in intervals
        )
        for count in sorted({count for count, _ in losses})
    ]
    return [head, *rows]
