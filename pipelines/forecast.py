"""What annealing would give now, without annealing, and how far such forecasts were off on the anneals that were made.

Everything comes from the run folder: evaluated snapshots and scheduled merges, and the annealing branches below the run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.journal import read_journal
from configs.errors import UserError
from configs.schema import Config
from pipelines.anneal import branch_config
from tasks.checkpoints.catalog import Glance
from tasks.checkpoints.run_folder import RUN_KEY, RunFolder
from tasks.evaluation.anneal_forecast import LEVEL, Anneal, BackTest, Prediction, back_test, predict
from tasks.evaluation.annealing_law import LossCurve
from tasks.evaluation.held_out import read_evaluation, suite_of
from tasks.merging.schedule import scheduled_rule
from tasks.training.schedule import step_learning_rate

BEST_FIRST = ("combined", "merged_with_offset", "law", "merged")
"""Which predictor the forecast is where too few real anneals tell them apart."""
ENOUGH = 3
"""Real anneals from which on the one that erred least is taken."""


def forecast(run_url: str, *, at: int | None = None, tokens: int | None = None) -> dict[str, Any]:
    """The held-out loss that an anneal over ``tokens`` which ends at step ``at`` would have.

    By default the anneal is as long as ``anneal.tokens`` and ends at the newest evaluated snapshot. Returns the fields of
    ``pma forecast --json``. Raises :class:`configs.errors.UserError` where nothing is evaluated at that step.
    """
    run = RunFolder(run_url)
    config = run.identity().config
    trunk = loss_curve(run, config, config)
    end = _end_step(run, trunk, at)
    budget = config.anneal.tokens if tokens is None else tokens
    anneals, left_out = real_anneals(run, config, trunk)
    thought = thought_of(run, config, trunk, end, budget)
    said = predict(thought, trunk, anneals)
    tests = back_test(anneals, trunk)
    in_time = back_test(anneals, trunk, only_earlier=True)
    chosen = choose_predictor(said, tests)
    width = tests[chosen].half_width() if chosen in tests else None
    loss = said.losses[chosen] if chosen else None
    return {
        "run": run.url,
        "step": end,
        "fork_step": thought.fork_step,
        "anneal_tokens": budget,
        "predictor": chosen,
        "forecast_loss": loss,
        "interval": [loss - width, loss + width] if loss is not None and width is not None else None,
        "interval_level": LEVEL,
        "cannot_know": cannot_know(said, anneals, width, left_out),
        "predictors": said.losses,
        "back_test": {name: _describe(test) for name, test in tests.items()},
        "back_test_earlier_only": {name: _describe(test) for name, test in in_time.items()},
        "anneals": [
            {"branch": a.name, "fork_step": a.fork_step, "end_step": a.end_step, "annealed_loss": a.annealed}
            for a in anneals
        ],
    }


def choose_predictor(said: Prediction, tests: Mapping[str, BackTest]) -> str | None:
    """The predictor that erred least on the real anneals or, with fewer than :data:`ENOUGH`, by :data:`BEST_FIRST`."""
    known = [name for name in BEST_FIRST if name in said.losses]
    tried = [name for name in known if name in tests and len(tests[name].errors) >= ENOUGH]
    if tried:
        return min(tried, key=lambda name: tests[name].mean_absolute)
    return known[0] if known else None


def loss_curve(run: RunFolder, config: Config, suite_config: Config) -> LossCurve:
    """Learning rates of every step of ``run`` and held-out losses of its evaluated snapshots."""
    suite = suite_of(suite_config)
    found = [(glance.step, _loss(run, glance.digest, suite)) for glance in run.glances() if not glance.ephemeral]
    points = [(step, loss) for step, loss in found if step and loss is not None]
    return LossCurve(
        learning_rates=learning_rates(run, config),
        warmup_steps=config.schedule.warmup_tokens // config.training.batch_tokens,
        steps=tuple(step for step, _ in points),
        losses=tuple(loss for _, loss in points),
    )


def learning_rates(run: RunFolder, config: Config) -> NDArray[np.float64]:
    """Learning rates of steps 1 to the run's end, ``[n]``: as journalled, which counts recoveries in, else as scheduled."""
    rates = np.array([step_learning_rate(config, step) for step in range(1, config.training.total_steps + 1)])
    for row in read_journal(run.store):
        rate = row.metrics.get("train/learning_rate")
        if rate is not None and 1 <= row.step <= len(rates):
            rates[row.step - 1] = rate
    return rates


def real_anneals(run: RunFolder, config: Config, trunk: LossCurve) -> tuple[list[Anneal], list[str]]:
    """Annealing branches of ``run`` that are trained and evaluated to their end, by their end, and why others are left out."""
    anneals, left_out = [], []
    for name in run.branches():
        branch = run.branch(name)
        if not branch.store.exists(RUN_KEY):
            continue
        identity = branch.identity()
        start, theirs = identity.start, identity.config
        if start is None or not theirs.schedule.decay_tokens:
            left_out.append(f"{name} does not anneal")
        elif suite_of(theirs) != suite_of(config):
            left_out.append(f"{name} is evaluated on other text")
        elif theirs.training.batch_tokens != config.training.batch_tokens:
            left_out.append(f"{name} has other batches")
        else:
            curve = _on_the_trunk(loss_curve(branch, theirs, config), trunk, start.step)
            if not curve.steps or curve.steps[-1] != theirs.training.total_steps:
                left_out.append(f"{name} is not trained and evaluated to its end yet")
            else:
                anneals.append(_beside_trunk(run, config, name, start.step, curve))
    return sorted(anneals, key=lambda anneal: anneal.end_step), left_out


def thought_of(run: RunFolder, config: Config, trunk: LossCurve, end_step: int, tokens: int) -> Anneal:
    """An anneal over ``tokens`` that nobody made and that ends at ``end_step``."""
    batch = config.training.batch_tokens
    fork = end_step - tokens // batch
    if tokens < batch or fork < config.schedule.warmup_tokens // batch:
        raise UserError(
            f"an anneal over {tokens:,} tokens that ends at step {end_step:,} would begin at step {fork:,}, before the end of "
            f"warm-up (schedule.warmup_tokens={config.schedule.warmup_tokens:,}), or have no step; give --tokens from {batch:,} "
            f"to {end_step * batch - config.schedule.warmup_tokens:,}, or a later --at"
        )
    branch = branch_config(config, fork * batch, tokens)
    decay = [step_learning_rate(branch, step) for step in range(fork + 1, end_step + 1)]
    curve = LossCurve(
        learning_rates=np.concatenate([trunk.learning_rates[:fork], decay]),
        warmup_steps=config.schedule.warmup_tokens // batch,
        steps=(),
        losses=(),
    )
    return _beside_trunk(run, config, "", fork, curve)


def cannot_know(said: Prediction, anneals: list[Anneal], width: float | None, left_out: Iterable[str]) -> list[str]:
    """What the forecast does not stand on, in sentences."""
    reasons = [f"{name}: {reason}" for name, reason in said.unknown.items()]
    if width is None:
        reasons.append(
            f"no interval: it takes two real anneals of this run, there are {len(anneals)}; make one with "
            "pma anneal --run URL --from STEP"
        )
    return [*reasons, *(f"left out: {reason}" for reason in left_out)]


def _beside_trunk(run: RunFolder, config: Config, name: str, fork: int, curve: LossCurve) -> Anneal:
    """The anneal with what the trunk has at its end."""
    end, suite = len(curve.learning_rates), suite_of(config)
    look = run.look()
    snapshot: Glance | None = next((glance for glance in look.snapshots() if glance.step == end), None)
    merged = look.merged().get(scheduled_rule(config).output_name(end, snapshot.recovery)) if snapshot else None
    return Anneal(
        name=name,
        fork_step=fork,
        end_step=end,
        curve=curve,
        raw=_loss(run, snapshot.digest, suite) if snapshot else None,
        merged=_loss(run, merged.digest, suite) if merged else None,
    )


def _on_the_trunk(curve: LossCurve, trunk: LossCurve, fork: int) -> LossCurve:
    """The branch's curve with the learning rates that the trunk really had up to the fork."""
    rates = curve.learning_rates.copy()
    rates[:fork] = trunk.learning_rates[:fork]
    return LossCurve(learning_rates=rates, warmup_steps=curve.warmup_steps, steps=curve.steps, losses=curve.losses)


def _end_step(run: RunFolder, trunk: LossCurve, at: int | None) -> int:
    if not trunk.steps:
        raise UserError(
            f"no snapshot of {run.url} is evaluated yet; pma evaluate, or pma tick --run {run.url}, does that"
        )
    if at is None:
        return trunk.steps[-1]
    if at not in trunk.steps:
        raise UserError(
            f"--at {at}: no evaluated snapshot of {run.url} at that step; there are {len(trunk.steps)}, the last at "
            f"{', '.join(str(step) for step in trunk.steps[-5:])}"
        )
    return at


def _loss(run: RunFolder, digest: str, suite: str) -> float | None:
    """Held-out loss of these weights, if it was measured and is finite."""
    evaluation = read_evaluation(run.store, digest, suite)
    return evaluation.loss if evaluation is not None and math.isfinite(evaluation.loss) else None


def _describe(test: BackTest) -> dict[str, Any]:
    return {"mean_absolute_error": test.mean_absolute, "anneals": len(test.errors), "errors": test.errors}
