"""Pre-training as a story: train, snapshot, merge and evaluate beside it, until all tokens are seen."""

from __future__ import annotations

import dataclasses
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from typing import Any

from cluster.session import ray_session
from cluster.storage import is_shared_with_workers
from configs.errors import UserError
from configs.load import identity_of
from configs.schema import Config
from pipelines.beside import Beside
from pipelines.driven import Driven
from pipelines.gangs import is_trained, train_to_end
from pipelines.progress import Progress
from pipelines.run_lease import hold_run
from pipelines.scheduled import due_now, unevaluated
from pipelines.steps import Step, pending_steps, run_steps
from pipelines.timing import timed
from pipelines.tracked.registration import ask_registration
from pipelines.tracking import TrackingThread
from pipelines.units import evaluation_units, merge_units, snapshot_units
from tasks.checkpoints.pins import hold_pins
from tasks.checkpoints.run_folder import RUN_KEY, RunFolder
from tasks.checkpoints.start_point import StartPoint
from tasks.data.readable import require_readable
from tasks.evaluation.held_out import suite_of
from tasks.merging.schedule import scheduled_rule
from tasks.training.sharding.mesh import plan_mesh

TRAINING_SECTIONS = ("seed", "workload", "model", "data", "training", "optimizer", "schedule", "snapshots")
"""Sections of a configuration that decide the bytes of its snapshots."""
FORK_KEEPS = ("training.batch_tokens", "training.sequence_length")
"""Beside the model's shape, what a fork shares with its run: the data position is counted in them."""
logger = logging.getLogger(__name__)


def pretrain(run_url: str, config: Config, *, fork: str | None = None) -> dict[str, Any]:
    """Train the run at ``run_url`` to its end; the same call again continues wherever it stood.

    With ``fork`` the run is a branch of that name below it, which begins at its newest snapshot and may have another
    configuration. Returns the fields of ``pma pretrain --json``.
    """
    started = time.perf_counter()
    run = prepare_run(run_url, config) if fork is None else prepare_fork(run_url, fork, config)
    continue_run(run, config)
    return summarise(run, seconds=time.perf_counter() - started)


def pretrain_steps(config: Config, start: StartPoint | None = None) -> list[Step[Driven]]:
    """The steps of pre-training: train, with merges and evaluations beside it, then what of these is left."""
    values = {key: value for key, value in identity_of(config).items() if key.split(".")[0] in TRAINING_SECTIONS}
    rule = scheduled_rule(config)
    return [
        Step(
            name="train",
            config={**values, **_start_values(start)},
            function=_train,
            units=snapshot_units,
            is_standing=lambda driven, _: is_trained(driven.run.glances(), driven.config),
        ),
        Step(
            name="merge",
            config=asdict(rule),
            needs=("train",),
            function=_finish_merges,
            units=merge_units,
            is_standing=lambda driven, _: not due_now(driven.run, driven.config),
        ),
        Step(
            name="evaluate",
            config={"suite": suite_of(config)},
            needs=("train", "merge"),
            function=_finish_evaluations,
            units=evaluation_units,
            is_standing=lambda driven, _: not unevaluated(driven.run, driven.config),
        ),
    ]


def prepare_run(run_url: str, config: Config) -> RunFolder:
    """Find the user's mistakes before any worker starts, and create the run or check that it is the same."""
    run = RunFolder(run_url)
    require_workable(run, config)
    run.begin(config)
    return run


def prepare_fork(run_url: str, name: str, config: Config) -> RunFolder:
    """The branch ``name`` of the run at ``run_url`` as a run with its own configuration, begun at the newest snapshot."""
    trunk = RunFolder(run_url)
    require_forkable(trunk, name, config)
    branch = trunk.branch(name)
    require_workable(branch, config)
    if branch.store.exists(RUN_KEY):
        branch.begin(config, branch.identity().start)
        return branch
    snapshots = trunk.snapshots()
    if not snapshots:
        raise UserError(f"{trunk.url} has no committed snapshot to fork from; give another --run instead")
    start = start_point(trunk, snapshots[-1].step)
    require_way_to_go(start, config)
    # Until the branch is on record, which keeps its start from then on, a pin does.
    with hold_pins([start]):
        branch.begin(config, start)
    return branch


def continue_run(run: RunFolder, config: Config, *, tracked_below: RunFolder | None = None) -> None:
    """Do what the run still lacks: training, merges, evaluations, tracking.

    A branch that is ``tracked_below`` its run is forwarded to MLflow with it, and registers no merges.
    """
    top = tracked_below or run
    driven = Driven(run=run, config=config, start=run.identity().start)
    steps = pretrain_steps(config, driven.start)
    with hold_run(run) as lease, TrackingThread(top, config) as tracking:
        if pending_steps(run.store, steps, driven):
            with working_session(run, config), Beside(run, config) as beside:
                run_steps(run.store, steps, replace(driven, lease=lease, beside=beside), lease)
        if top.url == run.url:
            register_newest(run, config)
        tracking.finish()


@contextmanager
def working_session(run: RunFolder, config: Config) -> Iterator[None]:
    """A Ray session for the run's workers, its start accounted as orchestration."""
    with ExitStack() as stack:
        with timed(run.store, "Ray start", "orchestration"):
            stack.enter_context(ray_session(config.cluster.address, num_cpus(config)))
        yield


def require_workable(run: RunFolder, config: Config) -> None:
    """Find the user's mistakes before anything starts: storage that workers cannot see, ranks that do not divide, data."""
    if not is_shared_with_workers(run.store):
        raise UserError(f"{run.url}: memory:// is seen by one process only; training needs a path or s3://")
    plan_mesh(config, config.training.num_workers)
    if not config.workload.is_language_model:
        # Its networks are built with torch, which the driver does without otherwise.
        from tasks.workload_checks import require_workload

        require_workload(config)
        return
    for note in require_readable(config):
        sys.stderr.write(f"{note}\n")


def has_work_left(run: RunFolder, config: Config) -> bool:
    """Whether training, a merge or an evaluation is due."""
    driven = Driven(run=run, config=config, start=run.identity().start)
    return bool(pending_steps(run.store, pretrain_steps(config, driven.start), driven))


def require_forkable(trunk: RunFolder, name: str, config: Config) -> None:
    """Refuse a fork that could not start from the run's weights, or whose name is no folder's."""
    if not name or not all(c.isalnum() or c in "._-" for c in name) or name.startswith("."):
        raise UserError(f"--fork {name!r}: letters, digits, '.', '_' and '-' only")
    old, new = identity_of(trunk.identity().config), identity_of(config)
    fixed = [key for key in {**old, **new} if key.startswith(("model.", "workload.")) or key in FORK_KEEPS]
    pairs = [(key, old.get(key), new.get(key)) for key in fixed]
    if changed := [f"  {key}: run has {mine!r}, asked for {asked!r}" for key, mine, asked in pairs if mine != asked]:
        raise UserError(
            f"a fork of {trunk.url} starts from its weights and data position, so these must stay:\n"
            + "\n".join(changed)
            + "\nGive them as they are, or another --run to begin afresh"
        )


def require_way_to_go(start: StartPoint, config: Config) -> None:
    """Refuse a branch that would end at its start or before it: there is nothing to train."""
    if config.training.total_tokens <= start.tokens_seen:
        raise UserError(
            f"training.total_tokens={config.training.total_tokens:,} is not beyond the fork's start, {start.url}, "
            f"which has seen {start.tokens_seen:,} tokens: the branch would have no step to train; tokens count from the "
            f"beginning of the run, so give training.total_tokens above {start.tokens_seen:,}"
        )


def num_cpus(config: Config) -> int:
    """Logical CPUs of a local Ray: one per training worker, and those that merges hold beside it."""
    return config.training.num_workers + config.merge.num_workers


def register_newest(run: RunFolder, config: Config) -> None:
    """Have the newest scheduled merge registered as a version of the run's model."""
    snapshots = run.snapshots()
    name = scheduled_rule(config).name_at(snapshots[-1].manifest) if snapshots else ""
    manifest = run.merged().get(name)
    if manifest is not None:
        ask_registration(run, f"{run.url}/merged/{name}", manifest, config.merge.shard_bytes)


def summarise(run: RunFolder, *, seconds: float) -> dict[str, Any]:
    """The fields of ``pma pretrain --json``, from committed manifests alone."""
    last = run.snapshots()[-1]
    return {
        "run": run.url,
        "final_step": last.step,
        "tokens_seen": last.manifest.tokens_seen,
        "final_snapshot": last.url,
        "digest": last.manifest.digest,
        "loss": last.manifest.loss.mean if last.manifest.loss else None,
        "segments": run.segments(),
        "recoveries": [dataclasses.asdict(recovery) for recovery in run.recoveries()],
        "seconds": round(seconds, 3),
    }


def start_point(run: RunFolder, step: int) -> StartPoint:
    """The snapshot at ``step`` as a start for another run."""
    from tasks.merging.selection import describe_steps

    snapshots = run.snapshots()
    chosen = next((s for s in snapshots if s.step == step), None)
    if chosen is None:
        raise UserError(f"{run.url} has no snapshot at step {step}; there are {describe_steps(snapshots)}")
    assert chosen.manifest.tokens_seen is not None
    return StartPoint(url=chosen.url, digest=chosen.manifest.digest, step=step, tokens_seen=chosen.manifest.tokens_seen)


def _start_values(start: StartPoint | None) -> dict[str, Any]:
    """What of ``start`` decides the bytes of snapshots; older records do not know of weights alone."""
    values: dict[str, Any] = {"start": None if start is None else start.digest}
    return {**values, "start_weights_only": True} if start is not None and start.weights_only else values


def _label(driven: Driven) -> str:
    """What the progress bar calls the training."""
    start, name = driven.start, driven.config.name
    if start is None:
        return name
    # An arm is told by its folder: the run's own, or that of a branch.
    return driven.run.url.rpartition("/")[2] if start.weights_only else f"{name} from step {start.step:,}"


def _train(driven: Driven) -> dict[str, Any]:
    assert driven.lease is not None
    label = _label(driven)
    beside = driven.beside
    with (
        Progress(driven.run, driven.config, label, lambda: list(beside.activity.values()) if beside else []),
        timed(driven.run.store, f"training {label}", "training"),
    ):
        train_to_end(driven.run, driven.config, driven.lease)
    last = driven.run.snapshots()[-1]
    return {"step": last.step, "digest": last.digest, "state_digest": last.manifest.state_digest}


def _finish_merges(driven: Driven) -> dict[str, Any]:
    assert driven.beside is not None
    with timed(driven.run.store, "merges after training", "evidence"):
        driven.beside.finish("merge")
    return {"merged": len(driven.run.merged())}


def _finish_evaluations(driven: Driven) -> dict[str, Any]:
    assert driven.beside is not None
    with timed(driven.run.store, "evaluations after training", "evidence"):
        driven.beside.finish()
    return {"evaluations": len(driven.run.store.keys("evaluations"))}
