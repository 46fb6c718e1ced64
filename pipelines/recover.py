"""Recovery from a loss spike: merge what was healthy before it, and put on record that training goes on from there.

Training itself is not touched: the next gang finds the record and begins where it says. The same spike with the same
record gives the same decision, so a driver that dies in between is followed by one that does the same again.
"""

from __future__ import annotations

import json
import logging
import time
from contextlib import nullcontext
from dataclasses import fields, replace
from typing import Any

from cluster.errors import StorageError
from cluster.journal import write_event
from cluster.lease import Lease
from cluster.storage import open_store
from configs.errors import UserError
from configs.load import override_execution
from configs.schema import Config
from pipelines.merge import RunTasks, merge_lease, task_runner
from pipelines.run_lease import hold_run
from pipelines.throttle import Throttle
from tasks.checkpoints.catalog import Glance, Look
from tasks.checkpoints.course import AS_CONFIGURED, Course, read_course
from tasks.checkpoints.manifest import STATE_KEY, read_manifest
from tasks.checkpoints.pins import hold_pins
from tasks.checkpoints.recoveries import Recovery, write_recovery
from tasks.checkpoints.run_folder import RunFolder
from tasks.checkpoints.start_point import StartPoint
from tasks.checkpoints.tied import open_untied
from tasks.merging.merge import execute_merge
from tasks.merging.methods import MethodChoice
from tasks.merging.plan import plan_merge
from tasks.merging.policy import MergePolicy
from tasks.recovery.detector import find_spike
from tasks.recovery.policy import RecoveryPlan, SpikeUnanswered, Wish, plan_by_hand, plan_recovery, rule_of
from tasks.recovery.record import parse_alarm, read_points
from tasks.recovery.rule import Alarm

METHOD = "sma"
"""How healthy snapshots are merged (arXiv 2505.12082, section 4.6: their average)."""
REMOTE_LOOK_SECONDS = 5.0
"""Between looks for an alarm where a look is a request."""
logger = logging.getLogger(__name__)


def recover(
    run_url: str, wish: Wish, *, onset: int | None = None, dry_run: bool = False, overrides: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Decide a recovery by hand; the next ``pma pretrain`` of the run begins with it.

    ``onset`` is the first step of the trouble; without it the newest segment's alarm counts, else what the detector finds
    in the journal. Returns the fields of ``pma recover --json``. Raises :class:`configs.errors.UserError` where there is no
    spike or nothing healthy before it, :class:`cluster.errors.LeaseHeld` while a driver works on the run.
    """
    run = RunFolder(run_url)
    config = override_execution(run.identity().config, overrides)
    alarm = _alarm_at(run, onset) if onset is not None else unanswered_alarm(run) or _alarm_in_journal(run, config)
    with nullcontext() if dry_run else hold_run(run) as lease:
        look = run.look()
        plan = plan_by_hand(config, alarm, candidates(look), look.recoveries, wish, inherited_course(run))
        answer = {"run": run.url, "dry_run": dry_run, **describe_plan(plan)}
        if lease is None:
            return answer
        with task_runner("local", [run.url, *(s.url for s in plan.inputs)]) as run_tasks:
            recovery = carry_out(run, config, plan, lease, run_tasks)
    return {**answer, "start": recovery.start.url}


def answer_spike(run: RunFolder, config: Config, alarm: Alarm, lease: Lease, run_tasks: RunTasks) -> Recovery:
    """The run's own answer to ``alarm``; raises :class:`SpikeUnanswered` if it has none left."""
    look = run.look()
    try:
        plan = plan_recovery(config, alarm, candidates(look), look.recoveries, inherited_course(run))
    except SpikeUnanswered as given_up:
        write_event(run.store, "spike-unanswered", {"step": alarm.alarm_step, "message": str(given_up)})
        raise
    logger.warning("%s; going back to step %d (%s)", alarm.reason, plan.start_step, plan.policy)
    return carry_out(run, config, plan, lease, run_tasks)


class SpikeAnswers:
    """Answers spikes while a gang is at work: looks now and then whether its segment ended with one."""

    def __init__(self, run: RunFolder, config: Config, lease: Lease, run_tasks: RunTasks) -> None:
        self._run, self._config, self._lease, self._run_tasks = run, config, lease, run_tasks
        self._throttle = Throttle(REMOTE_LOOK_SECONDS if run.store.reads_ahead else 0.0)

    def look(self) -> None:
        """Answer an alarm, if there is one; raises :class:`SpikeUnanswered` as :func:`answer_spike`."""
        if not self._throttle.passes():
            return
        try:
            if (alarm := unanswered_alarm(self._run)) is not None:
                answer_spike(self._run, self._config, alarm, self._lease, self._run_tasks)
        except StorageError as error:
            # The gang is well, or waits: the next look may succeed. What was done is found then.
            self._throttle.seconds = REMOTE_LOOK_SECONDS
            logger.warning("storage failed while looking for a spike, or answering one: %s", error)


def carry_out(run: RunFolder, config: Config, plan: RecoveryPlan, lease: Lease, run_tasks: RunTasks) -> Recovery:
    """Make the start of ``plan``, then put the decision on record."""
    started = time.perf_counter()
    plan = _with_moments_there(plan)
    start = _merged_start(run, config, plan, run_tasks) if len(plan.inputs) > 1 else _start_at(plan.inputs[0])
    merged = time.perf_counter() - started
    lease.check()
    shared = {item.name: getattr(plan, item.name) for item in fields(Recovery) if hasattr(plan, item.name)}
    recovery = Recovery(**shared, start=start, count=len(plan.inputs), created=time.time())
    write_recovery(run.store, recovery)
    details = {key: value for key, value in describe_plan(plan).items() if key != "inputs"}
    write_event(run.store, "recovery", {**details, "start": start.url, "merge_seconds": merged})
    return recovery


def unanswered_alarm(run: RunFolder) -> Alarm | None:
    """The alarm that the newest segment ended with, if no recovery was decided since."""
    newest = run.newest_segment()
    end = newest["end"] if newest else None
    if newest is None or not end or end["reason"] != "spike":
        return None
    answered = any(r.number > newest["plan"].get("recovery", 0) for r in run.recoveries())
    return None if answered else parse_alarm(end["alarm"])


def candidates(look: Look) -> list[Glance]:
    """Snapshots that a recovery may go back to, by step."""
    return [s for s in look.snapshots() if s.kind == "training" and not s.ephemeral]


def inherited_course(run: RunFolder) -> Course:
    """What recoveries of the run that this one was forked from changed for good; weights alone bring nothing of it."""
    start = run.identity().start
    data = open_store(start.url).read_if_present(STATE_KEY) if start and not start.weights_only else None
    return read_course(json.loads(data)) if data is not None else AS_CONFIGURED


def describe_plan(plan: RecoveryPlan) -> dict[str, Any]:
    """``plan`` as JSON has it."""
    return {
        "recovery": plan.number,
        "incident": plan.incident,
        "attempt": plan.attempt,
        "policy": plan.policy,
        "start_step": plan.start_step,
        "inputs": [{"step": s.step, "url": s.url, "digest": s.digest} for s in plan.inputs],
        "moments": plan.moments,
        "learning_rate_scale": plan.learning_rate_scale,
        "rewarm_tokens": plan.rewarm_tokens,
        "skipped_sequences": sum(skip.count for skip in plan.skips),
        "onset_step": plan.onset_step,
        "alarm_step": plan.alarm_step,
        "confirm_step": plan.confirm_step,
        "reason": plan.reason,
    }


def _with_moments_there(plan: RecoveryPlan) -> RecoveryPlan:
    """``plan`` with moments that its inputs can give: weights alone leave none to merge."""
    if plan.moments == "reset" or all(read_manifest(open_store(s.url))[0].state_tensors() for s in plan.inputs):
        return plan
    logger.warning("some of the snapshots hold no optimizer moments: they start at zero")
    return replace(plan, moments="reset")


def _merged_start(run: RunFolder, config: Config, plan: RecoveryPlan, run_tasks: RunTasks) -> StartPoint:
    url = f"{run.url}/merged/recovery-{plan.number:04d}-{METHOD}-n{len(plan.inputs)}-step-{plan.start_step:09d}"
    with merge_lease(url) as lease, hold_pins(plan.inputs):
        merge = plan_merge(
            [open_untied(snapshot.url) for snapshot in plan.inputs],
            MethodChoice(method=METHOD),
            output_url=url,
            shard_bytes=config.merge.shard_bytes,
            policy=MergePolicy(moments=plan.moments),
        )
        report = execute_merge(merge, lambda function, tasks: run_tasks(function, tasks, lease.is_lost), lease.check)
    newest = plan.inputs[-1]
    return StartPoint(
        url=url, digest=report.manifest.digest, step=newest.step or 0, tokens_seen=newest.tokens_seen or 0
    )


def _start_at(snapshot: Glance) -> StartPoint:
    return StartPoint(
        url=snapshot.url, digest=snapshot.digest, step=snapshot.step or 0, tokens_seen=snapshot.tokens_seen or 0
    )


def _alarm_at(run: RunFolder, onset: int) -> Alarm:
    """An alarm that somebody gives: from ``onset`` to where the run stands."""
    snapshots, segments = run.glances(), run.segments()
    reached = max([s.step or 0 for s in snapshots] + [s["end"]["step"] for s in segments[-1:] if s["end"]], default=0)
    if not 1 <= onset <= reached:
        raise UserError(f"--onset {onset}: the run stands at step {reached}; give the first step of the trouble")
    return Alarm(
        kind="loss",
        onset_step=onset,
        alarm_step=reached,
        value=float("nan"),
        baseline=None,
        scale=None,
        reason=f"trouble from step {onset} on, said by hand",
    )


def _alarm_in_journal(run: RunFolder, config: Config) -> Alarm:
    snapshots = run.glances()
    points = read_points(run.store, snapshots[-1].step or 0 if snapshots else 0)
    alarm = find_spike(points, rule_of(config))
    if alarm is None:
        raise UserError(
            f"{run.url}: no spike is on record and the detector finds none in the journal; say where the trouble begins "
            "with --onset STEP"
        )
    return alarm
