"""What no study can be made of, found before anything is trained."""

from __future__ import annotations

from cluster.storage import scheme_of
from configs.errors import UserError
from configs.schema import Config
from configs.study import StudyConfig
from pipelines.anneal import branch_config
from pipelines.stages import StageRequest, require_stage
from pipelines.study.layout import STAGES, Study
from pipelines.study.spike_arms import ARMS, SNAPSHOT_STEPS


def require_study(study: Study) -> None:
    """Raise :class:`configs.errors.UserError` for the first mistake in the study's configuration, naming its key."""
    if scheme_of(study.url) != "file":
        raise UserError(f"{study.url}: a study's runs are made on this machine; give --run a path")
    trunk = study.trunk_config(study.config.seeds[0])
    _require_steps(study.config, trunk)
    _require_windows(study, trunk)
    _require_stages(study, trunk)
    _require_spikes(study.config)


def _require_steps(config: StudyConfig, trunk: Config) -> None:
    total, batch = trunk.training.total_steps, trunk.training.batch_tokens
    interval, length = trunk.snapshots.interval_tokens // batch, trunk.anneal.tokens // batch
    off = [step for step in (*config.forks, *config.grid.ends) if step % interval or not 0 < step <= total]
    if off:
        raise UserError(
            f"forks and grid.ends: there is no snapshot at step {off[0]:,}; the trunk has {total:,} steps and a snapshot "
            f"every {interval:,}"
        )
    if config.forks[-1] + length != total:
        raise UserError(
            f"forks: the last anneal leaves at step {config.forks[-1]:,} and has {length:,} steps, so it ends at "
            f"{config.forks[-1] + length:,}; it is to end with the trunk, at {total:,}"
        )
    for fork in config.forks:
        branch_config(trunk, fork * batch, trunk.anneal.tokens)
    if length // interval < config.inside_count:
        raise UserError(f"inside_count={config.inside_count}: the anneal has {length // interval} snapshots")


def _require_windows(study: Study, trunk: Config) -> None:
    """The smallest window of the grid at the first end, and the scheduled merge at the last, must be possible."""
    grid, rule, batch = study.config.grid, study.trunk_rule(study.config.seeds[0]), trunk.training.batch_tokens
    span = (grid.counts[0] - 1) * grid.interval_multiples[0] * trunk.snapshots.interval_tokens
    if span >= grid.ends[0] * batch:
        raise UserError(
            f"grid.ends: {grid.counts[0]} snapshots {grid.interval_multiples[0]} intervals apart do not fit before step {grid.ends[0]:,}"
        )
    if (rule.count - 1) * rule.interval_tokens >= grid.ends[-1] * batch:
        raise UserError(
            f"grid.ends: the scheduled merge of {rule.count} snapshots does not fit before step {grid.ends[-1]:,}"
        )


def _require_stages(study: Study, trunk: Config) -> None:
    for kind, stage in (("continued", study.config.continued), ("sft", study.config.sft)):
        for number, arm in enumerate(stage.arms if stage else ()):
            assert stage is not None
            config = study.stage_config(stage, number, study.config.seeds[0])
            require_stage(StageRequest(stage=STAGES[kind], init=""), config)
            if config.model != trunk.model:
                raise UserError(
                    f"{kind}.arms: {arm.name} has another model section ({stage.config}) than the trunk ({study.config.base})"
                )


def _require_spikes(config: StudyConfig) -> None:
    if config.spikes is None:
        return
    unknown = {*config.spikes.faults} - SNAPSHOT_STEPS.keys() | {*config.spikes.arms} - ARMS.keys()
    if unknown:
        raise UserError(
            f"spikes: {sorted(unknown)[0]!r} is not known; faults: {', '.join(SNAPSHOT_STEPS)}; arms: {', '.join(ARMS)}"
        )
