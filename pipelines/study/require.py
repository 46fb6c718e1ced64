"""What no study can be made of, found before anything is trained."""

from __future__ import annotations

from cluster.storage import scheme_of
from configs.errors import UserError
from pipelines.study.layout import Study
from pipelines.study.spike_arms import ARMS, SNAPSHOT_STEPS


def require_study(study: Study) -> None:
    """Find what no study can be made of, before anything is trained."""
    config = study.config
    if scheme_of(study.url) != "file":
        raise UserError(f"{study.url}: a study's runs are made on this machine; give --run a path")
    for seed in config.seeds:
        trunk = study.trunk_config(seed)
        total, batch = trunk.training.total_steps, trunk.training.batch_tokens
        interval, length = trunk.snapshots.interval_tokens // batch, trunk.anneal.tokens // batch
        off = [step for step in (*config.forks, *config.grid.ends) if step % interval or step > total]
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
        if length // interval < config.inside_count:
            raise UserError(f"inside_count={config.inside_count}: the anneal has {length // interval} snapshots")
    if config.spikes is not None:
        unknown = {*config.spikes.faults} - SNAPSHOT_STEPS.keys() | {*config.spikes.arms} - ARMS.keys()
        if unknown:
            raise UserError(
                f"spikes: {sorted(unknown)[0]!r} is not known; faults: {', '.join(SNAPSHOT_STEPS)}; arms: {', '.join(ARMS)}"
            )
    for stage in (config.continued, config.sft):
        for number in range(len(stage.arms) if stage else 0):
            assert stage is not None
            study.stage_config(stage, number, config.seeds[0])
