"""The answers on top of the page: is the run healthy, what does merging give, what would annealing, which N and V, what next."""

from __future__ import annotations

import html
import shlex
import time
from dataclasses import dataclass, replace
from typing import Any, Literal

from pipelines.anneal import branch_name
from pipelines.render_evidence import PREDICTORS
from pipelines.report.data import Evaluated, ReportData
from pipelines.report.heat_map import method_label
from tasks.evaluation.paired import CONFIDENCE, paired_difference

PREDICTORS_IN_FULL = PREDICTORS | {"combined": "the mean of the law and of the merge with the offset of real anneals"}
NEXT_STEPS = 3
"""At most so many are named."""


State = Literal["good", "bad", "open"]
STATES: dict[int, State] = {1: "good", -1: "bad", 0: "open"}
"""By the sign of what merging gains."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One question of whoever answers for the run."""

    question: str
    """Plain text."""
    verdict: str
    """The answer in a few words, plain text."""
    text: str
    """What it stands on; HTML."""
    state: State = "open"
    """How it looks for the run."""


def answer_all(data: ReportData) -> list[Answer]:
    """All answers, in the order in which they are asked."""
    return [is_healthy(data), what_merging_gives(data), what_annealing_gives(data), which_window(data), what_next(data)]


def is_healthy(data: ReportData) -> Answer:
    """Where the run stands and what went wrong on the way."""
    newest = data.journal[-1] if data.journal else None
    total = data.config.training.total_steps
    step = max(newest.step if newest else 0, (data.last.step or 0) if data.last else 0)
    facts = [
        f"Step {step:,} of {total:,}, {millions(step * data.config.training.batch_tokens)}",
        f"last loss {newest.metrics['train/loss']:.4f}" if newest and "train/loss" in newest.metrics else "",
        f"measured {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime(newest.time))}" if newest else "",
        f"{count(data.num_alarms, 'alarm')}, {count(len(data.recoveries), 'recovery', 'recoveries')}"
        + (f", {len(data.confirmed)} of them held" if data.recoveries else ""),
    ]
    if data.unhealthy:
        shown = ", ".join(f"{step:,}" for step in data.unhealthy[:5])
        facts.append(f"{count(len(data.unhealthy), 'snapshot')} after steps that were not finite (step {shown})")
    text = html.escape(f"{'; '.join(fact for fact in facts if fact)}.")
    asked = Answer(question="Is it healthy?", verdict="Yes", text=text, state="good")
    if data.given_up:
        return replace(
            asked, verdict="No, it gave up on a loss spike", text=f"{text} {html.escape(data.given_up)}", state="bad"
        )
    if step == 0:
        return replace(asked, verdict="It has not trained a step", state="open")
    if data.num_alarms > len(data.confirmed) or data.unhealthy:
        return replace(asked, verdict="Look at it", state="bad")
    return replace(asked, verdict="Yes, and complete" if step >= total else "Yes, and under way")


def what_merging_gives(data: ReportData) -> Answer:
    """The newest scheduled merge against the raw snapshot at the same tokens."""
    asked = Answer(question="What does merging give now?", verdict="Not measured yet", text="")
    pair = last_pair(data)
    if pair is None:
        have = f"{count(len(data.raw), 'snapshot')} and {count(len(data.merged), 'scheduled merge')} are evaluated"
        return replace(asked, text=f"{have}, none of them at the same tokens.")
    raw, merged = pair
    found = paired_difference(raw.evaluation.slices, merged.evaluation.slices, "slices")
    gain = raw.evaluation.loss - merged.evaluation.loss
    interval = ""
    if found is not None and found.low is not None and found.high is not None:
        interval = (
            f" ({CONFIDENCE:.0%} interval {found.low:+.4f} to {found.high:+.4f} over {found.num} held-out slices)"
        )
    rule = f"{data.config.merge.method.upper()} of {len(merged.glance.inputs)}"
    text = (
        f"{merged.evaluation.loss:.4f} merged ({rule}) against {raw.evaluation.loss:.4f} raw at {millions(raw.tokens)}, "
        f"{gain:+.4f} in favour of the merge{interval}."
    )
    sign = found.sign if found is not None else 0
    verdict = f"{abs(gain):.4f} nats {'lower' if gain > 0 else 'higher'}" + (
        "" if sign else ", not told apart from none"
    )
    return replace(asked, verdict=verdict, text=html.escape(text), state=STATES[sign])


def what_annealing_gives(data: ReportData) -> Answer:
    """The forecast, with how far such forecasts were off."""
    asked = Answer(question="What would annealing give?", verdict="Cannot say yet", text="")
    said = data.evidence.forecast
    if said is None or said["forecast_loss"] is None:
        reason = data.evidence.no_forecast
        done = data.config.schedule.decay_tokens > 0
        return replace(asked, verdict="The run anneals itself" if done else asked.verdict, text=_sentence(reason))
    low, high = said["interval"] or (None, None)
    width = f" ({said['interval_level']:.0%} interval {low:.4f} to {high:.4f})" if low is not None else " (no interval)"
    test = said["back_test"].get(said["predictor"])
    off = (
        f", which was off by {test['mean_absolute_error']:.4f} over {count(test['anneals'], 'real anneal')}"
        if test
        else ""
    )
    text = (
        f"An anneal over {millions(said['anneal_tokens'])} that ends at step {said['step']:,}{width}, by "
        f"{PREDICTORS_IN_FULL[said['predictor']]}{off}."
    )
    real = [f"{a['annealed_loss']:.4f} at step {a['end_step']:,}" for a in said["anneals"]]
    if real:
        text += f" Really annealed: {', '.join(real[-3:])}."
    if said["interval"] is None:
        text += " Without two real anneals of this run nobody knows how far it is off."
    return replace(asked, verdict=f"About {said['forecast_loss']:.4f}", text=html.escape(text))


def which_window(data: ReportData) -> Answer:
    """What the latest ablation recommends."""
    asked = Answer(question="Which N and V?", verdict="Not tried yet", text="")
    record = data.evidence.ablation
    if record is None or not record["ends"]:
        now = data.config.merge
        return replace(
            asked,
            text=f"The schedule has {html.escape(now.method.upper())}, N {now.count}, V {data.config.merge_interval_tokens:,} tokens.",
        )
    end = max(record["ends"], key=lambda end: end["step"])
    cells = {cell["name"]: cell for cell in record["cells"]}
    chosen, best = cells[end["chosen"]], cells[end["best"]]
    others = len(end["not_told_apart"]) - 1
    tried = sum(1 for cell in cells.values() if cell["end_step"] == end["step"]) - 1
    text = (
        f"Loss {chosen['loss']:.4f} at step {end['step']:,}, the lowest of the grid is {best['loss']:.4f} "
        f"({_window(best)}); {others} of {tried} others {'is' if others == 1 else 'are'} not told apart from it."
    )
    return replace(asked, verdict=_window(chosen), text=html.escape(text), state="good")


def what_next(data: ReportData) -> Answer:
    """What is open, the most useful first, with the command for it."""
    steps = open_steps(data)
    asked = Answer(question="What next?", verdict="Nothing is open", text="All that the report shows is on record.")
    if not steps:
        return asked
    (why, command), *others = steps[:NEXT_STEPS]
    more = len(steps) - NEXT_STEPS
    left = [f"<li>and {more} more</li>"] if more > 0 else []
    items = [f"<li>{html.escape(later)}: <code>{html.escape(how)}</code></li>" for later, how in others]
    then = f"<p>Then:</p><ul>{''.join([*items, *left])}</ul>" if items else ""
    return replace(asked, verdict=why, text=f"<code>{html.escape(command)}</code>{then}")


def open_steps(data: ReportData) -> list[tuple[str, str]]:
    """Reason and command of what could be done next."""
    run, steps = shlex.quote(data.url), []
    if data.given_up:
        steps.append(("Decide what becomes of the spike", f"pma recover --run {run} --dry-run"))
    if data.num_unevaluated:
        what = f"{count(data.num_unevaluated, 'checkpoint')} {'has' if data.num_unevaluated == 1 else 'have'} no held-out loss"
        steps.append((what, f"pma evaluate --run {run} --missing"))
    if data.raw and data.evidence.ablation is None and len(data.raw) > 2:
        steps.append(("No ablation of N and V yet", f"pma ablate --run {run}"))
    steps += _schedule_step(data)
    if fork := _fork_step(data):
        made = len((data.evidence.forecast or {}).get("anneals", ()))
        why = ("No real anneal to check the forecast by", "A second real anneal gives the forecast an interval")[made]
        steps.append((why, f"pma anneal --run {run} --from {fork}"))
    return steps


def _schedule_step(data: ReportData) -> list[tuple[str, str]]:
    """What to set, where the ablation recommends another window than the schedule has."""
    record = data.evidence.ablation
    if record is None or not record["ends"]:
        return []
    wanted = max(record["ends"], key=lambda end: end["step"])["recommended"]
    now = data.config.merge
    if (wanted["method"], wanted["count"], wanted["interval_tokens"]) == (
        now.method, now.count, data.config.merge_interval_tokens,
    ):  # fmt: skip
        return []
    values = f"merge.method={wanted['method']} merge.count={wanted['count']} merge.interval_tokens={wanted['interval_tokens']}"
    return [("Take the window that the ablation recommends in the next run", values)]


def _fork_step(data: ReportData) -> int | None:
    """Where a real anneal that would tell something could begin: a snapshot its budget before the end, not annealed from yet."""
    said, config = data.evidence.forecast, data.config
    if said is None or len(said["anneals"]) >= 2:
        return None
    steps = [row.glance.step or 0 for row in data.raw if row.tokens >= config.schedule.warmup_tokens]
    latest = (said["step"] * config.training.batch_tokens - config.anneal.tokens) // config.training.batch_tokens
    free = [step for step in steps if step <= latest and branch_name(step) not in data.branches]
    return free[-1] if free else None


def last_pair(data: ReportData) -> tuple[Evaluated, Evaluated] | None:
    """The newest raw snapshot that has a scheduled merge at the same tokens, and that merge."""
    merged = {row.tokens: row for row in data.merged}
    pairs = [(raw, merged[raw.tokens]) for raw in data.raw if raw.tokens in merged]
    return pairs[-1] if pairs else None


def millions(tokens: int) -> str:
    """``8.19 M tokens``."""
    return f"{tokens / 1e6:,.2f} M tokens"


def count(number: int, one: str, many: str = "") -> str:
    """``no alarm``, ``1 alarm``, ``2 alarms``."""
    word = one if number == 1 else many or f"{one}s"
    return f"{number:,} {word}" if number else f"no {one}"


def _window(cell: dict[str, Any]) -> str:
    return f"{method_label(cell)}, N {cell['count']}, V {cell['interval_tokens']:,} tokens"


def _sentence(text: str) -> str:
    return html.escape(f"{text[:1].upper()}{text[1:]}.") if text else ""
