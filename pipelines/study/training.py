"""What a study trains: trunks with their annealing branches, and the arms of later stages."""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import Any

from configs.study import StageConfig
from pipelines.anneal import anneal, branch_name
from pipelines.arms import read_arm
from pipelines.initial import InitialWeights
from pipelines.merge import carry_out
from pipelines.pretrain import continue_run, prepare_run
from pipelines.stages import StageRequest, plan_stage, run_stage
from pipelines.study.layout import STAGES, Study
from tasks.checkpoints.tied import open_untied
from tasks.evaluation.arms import compare_arms, figures_of
from tasks.merging.merge import find_standing
from tasks.merging.methods import MethodChoice
from tasks.merging.plan import Recipe, plan_merges
from tasks.merging.selection import select_window
from tasks.recovery.policy import rule_of

logger = logging.getLogger(__name__)


def train_trunk(study: Study, seed: int) -> dict[str, Any]:
    """Pre-train the trunk of ``seed``, merged and evaluated on schedule, and all of its annealing branches."""
    config = study.trunk_config(seed)
    run = prepare_run(study.trunk(seed).url, config)
    continue_run(run, config)
    for fork in study.config.forks:
        anneal(run.url, fork)
    merge_inside(study, seed)
    return {
        "digest": run.glances()[-1].digest,
        "anneals": {
            branch_name(fork): run.branch(branch_name(fork)).glances()[-1].digest for fork in study.config.forks
        },
    }


def is_trunk_standing(study: Study, seed: int) -> bool:
    """Whether trunk and branches are there to their ends."""
    steps = study.last_step(seed)
    anneal_steps = study.trunk_config(seed).anneal.tokens // study.trunk_config(seed).training.batch_tokens
    runs = [(study.trunk(seed), steps)]
    runs += [(study.trunk(seed).branch(branch_name(fork)), fork + anneal_steps) for fork in study.config.forks]
    return all((glances := run.glances()) and glances[-1].step == end for run, end in runs)


def merge_inside(study: Study, seed: int) -> None:
    """The merge of the last snapshots of the last anneal, which SFT begins with."""
    branch, rule = study.last_branch(seed), study.inside_rule(seed)
    window = select_window([glance for glance in branch.glances() if not glance.ephemeral], rule)
    recipe = Recipe(
        output_url=study.start_url("annealed-merged", seed), choice=MethodChoice(method=rule.method), count=rule.count
    )
    plans = plan_merges([open_untied(snapshot.url) for snapshot in window], [recipe])
    if find_standing(plans[0]) is None:
        carry_out("local", plans)


def train_arms(study: Study, kind: str, stage: StageConfig, seed: int) -> dict[str, Any]:
    """Train every arm of ``stage`` for ``seed``, and compare each with the first, its control.

    Arms of one configuration read the same batches; those with another learning rate do, too.
    """
    arms = []
    for number, arm in enumerate(stage.arms):
        config = study.stage_config(stage, number, seed)
        request = StageRequest(stage=STAGES[kind], init=study.start_url(arm.start, seed))
        run = study.stage_run(kind, arm.name, seed)
        logger.info("%s: %s, seed %d", kind, arm.name, seed)
        run_stage(run.url, config, request)
        arms.append(plan_stage(run, config, request)[0].init)
    return describe_arms(stage, seed, arms)


def describe_arms(stage: StageConfig, seed: int, arms: list[InitialWeights]) -> dict[str, Any]:
    """Figures of every arm, and what it differs by from the arm that it is compared with."""
    measured = {arm.name: read_arm(w.run, w.config, w.start) for arm, w in zip(stage.arms, arms, strict=True)}
    rule = rule_of(arms[0].config)
    pairs = [(stage.arms[0].name, arm.name) for arm in stage.arms[1:]]
    by_start = {arm.start: arm.name for arm in reversed(stage.arms)}
    if {"raw", "merged"} <= by_start.keys() and (by_start["raw"], by_start["merged"]) not in pairs:
        pairs.append((by_start["raw"], by_start["merged"]))
    return {
        "arms": {name: asdict(figures_of(arm, rule)) for name, arm in measured.items()},
        "differences": {
            f"{name} less {control}": {
                quantity: asdict(item)
                for quantity, item in compare_arms(seed, measured[name], measured[control], rule).differences.items()
            }
            for control, name in pairs
        },
    }
