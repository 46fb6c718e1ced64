"""Later stages as a story: continued training and SFT from given weights, beside matched control arms, and what differs."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal

from configs.errors import UserError
from configs.schema import Config
from pipelines.arms import compare_pairs, initial_evaluation, record_comparison
from pipelines.initial import InitialCheckpoint, InitialWeights, begin_with, find_initial_weights
from pipelines.pretrain import continue_run, has_work_left, require_workable, summarise, working_session
from pipelines.tracking import bring_up_to_date
from tasks.checkpoints.run_folder import RunFolder

Stage = Literal["continue-training", "sft"]
CHAT = "chat"
"""The ``data.format`` of conversations."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StageRequest:
    """What ``pma continue-training`` and ``pma sft`` were asked for."""

    stage: Stage
    """The command."""
    init: str
    """Checkpoint whose weights the stage begins with."""
    control: str | None = None
    """Checkpoint that the matched arm begins with."""
    seeds: tuple[int, ...] = ()
    """Seeds to run the arms with; empty for the configuration's own."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The arms of one seed."""

    seed: int
    """Decides the order of the data; the same for both."""
    init: InitialWeights
    """The arm that is asked about."""
    control: InitialWeights | None
    """The arm that differs in its weights at the start alone."""

    @property
    def arms(self) -> list[InitialWeights]:
        """Those that there are."""
        return [self.init, *([self.control] if self.control else [])]


def run_stage(run_url: str, config: Config, request: StageRequest) -> dict[str, Any]:
    """Train the stage's arms to their end, one after the other, and compare them; the same call again continues.

    Returns the fields of ``pma continue-training --json``.
    """
    pairs = plan_stage(RunFolder(run_url), config, request)
    arms = [arm for pair in pairs for arm in pair.arms]
    for arm in arms:
        begin_with(arm)
    top, seconds = pairs[0].init.run, {}
    with ExitStack() as stack:
        if any(has_work_left(arm.run, arm.config) for arm in arms):
            stack.enter_context(working_session(top, config))
        for arm in arms:
            started = time.perf_counter()
            continue_run(arm.run, arm.config, tracked_below=top)
            seconds[arm.run.url] = time.perf_counter() - started
    result = summarise_stage(pairs, seconds)
    if result["comparison"]:
        record_comparison(top, result["comparison"])
        if error := bring_up_to_date(top, config)["error"]:
            logger.warning("%s. The comparison waits in the run folder", error)
    return result


def plan_stage(top: RunFolder, config: Config, request: StageRequest) -> list[Pair]:
    """The arms that ``request`` asks for, with everything that is wrong with them found; writes nothing.

    The first seed's arm is the run at ``top``; all others are branches of it.
    """
    require_stage(request, config)
    require_workable(top, config)
    init = InitialCheckpoint("--init", request.init, config)
    control = InitialCheckpoint("--control", request.control, config) if request.control else None
    seeds = request.seeds or (config.seed,)
    pairs = [_plan_pair(top, replace(config, seed=seed), init, control, is_first=seed == seeds[0]) for seed in seeds]
    for pair in pairs:
        if pair.control is not None and pair.control.start.digest == pair.init.start.digest:
            raise UserError(f"--control {request.control} holds the same weights as --init: the arms would not differ")
    return pairs


def _plan_pair(
    top: RunFolder, config: Config, init: InitialCheckpoint, control: InitialCheckpoint | None, *, is_first: bool
) -> Pair:
    seed = [] if is_first else [f"seed-{config.seed}"]
    branch = top.branch("-".join(["control", *seed]))
    return Pair(
        seed=config.seed,
        init=find_initial_weights(init, top.branch(*seed) if seed else top, config),
        control=find_initial_weights(control, branch, config) if control else None,
    )


def require_stage(request: StageRequest, config: Config) -> None:
    """Refuse what no stage can be made of."""
    if request.stage == "sft" and str(config.data.format) != CHAT:
        raise UserError(
            f"pma sft trains on answers in conversations: it needs data.format={CHAT}, got {config.data.format}; "
            "for plain text use pma continue-training"
        )
    if len(set(request.seeds)) != len(request.seeds):
        raise UserError(f"--seeds {' '.join(map(str, request.seeds))}: give each seed once")


def summarise_stage(pairs: Sequence[Pair], seconds: Mapping[str, float]) -> dict[str, Any]:
    """The fields of ``pma continue-training --json``, from run folders alone; ``seconds`` of each arm by its run's URL."""
    rows = [
        {
            "seed": pair.seed,
            **summarise_arm(pair.init, seconds),
            "control": summarise_arm(pair.control, seconds) if pair.control else None,
        }
        for pair in pairs
    ]
    matched = [(pair.init, pair.control) for pair in pairs if pair.control]
    return {
        **rows[0],
        "seeds": rows,
        "comparison": compare_pairs(matched) if matched else None,
        "seconds": round(sum(seconds.values()), 3),
    }


def summarise_arm(arm: InitialWeights, seconds: Mapping[str, float]) -> dict[str, Any]:
    """An arm as ``pretrain --json`` has a run, and the weights that it began with."""
    evaluation = initial_evaluation(arm)
    init = {"url": arm.start.url, "digest": arm.start.digest, "loss": evaluation.loss if evaluation else None}
    return {**summarise(arm.run, seconds=seconds.get(arm.run.url, 0.0)), "init": init}
