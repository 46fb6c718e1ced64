"""Which checkpoints of a run stay and which may go: a pure function of what the run holds and of who needs what.

A snapshot goes only if the policy is set, no rule of it keeps the snapshot, and nobody needs it. Every row of the plan
says why.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from configs.merging import RetentionConfig
from tasks.checkpoints.catalog import Glance
from tasks.checkpoints.pins import checkpoint_name
from tasks.checkpoints.start_point import StartPoint

LEFT_BEHIND = "left behind by a recovery"
RECOVERY_COUNT = 3
"""Healthy snapshots before a spike that recovery merges (the paper's N for it, arXiv 2505.12082)."""
Reasons = Mapping[str, Sequence[str]]
"""Folder below the run, as ``snapshots/step-000001000``, to why it must stay."""


@dataclass(frozen=True, kw_only=True)
class SpikeReach:
    """What a try at a spike asks for."""

    count: int
    """Healthy snapshots that it needs."""
    limit_tokens: int
    """Tokens seen by the newest that it may use. Negative early in a run."""


@dataclass(frozen=True, kw_only=True)
class Holdings:
    """What a run holds and who needs what, as it was read in one go."""

    snapshots: tuple[Glance, ...]
    """By step."""
    merged: Mapping[str, Glance]
    """By name, without those left behind."""
    needed: Reasons
    """What pins, windows, branches, segments, recoveries' starts and registered versions need."""
    surplus: Collection[str]
    """Names of merges that the schedule gives away."""
    left_behind: tuple[Glance, ...] = ()
    """Snapshots that a recovery left behind, by step."""
    left_behind_merges: Mapping[str, Glance] = field(default_factory=dict)
    """Merges that end on a way which a recovery left behind, by name."""
    reach: SpikeReach | None = None
    """Of the last try at a spike that is yet to come, or to come back; earlier tries use later ones. None: no tries."""


@dataclass(frozen=True, kw_only=True)
class RetentionRow:
    """One checkpoint of a plan."""

    name: str
    """Folder below the run."""
    url: str
    """Folder."""
    step: int | None
    """Completed optimizer steps."""
    bytes: int
    """Of its objects in the run; none of an adopted one, whose weights lie elsewhere."""
    digest: str
    """Content digest."""
    created: float
    """Unix seconds."""
    action: Literal["keep", "delete"]
    """What becomes of it."""
    reasons: tuple[str, ...]
    """Why."""


@dataclass(frozen=True, kw_only=True)
class RetentionPlan:
    """What becomes of every checkpoint of a run."""

    rows: tuple[RetentionRow, ...]
    """Snapshots by step, then merges by name."""

    @property
    def doomed(self) -> tuple[RetentionRow, ...]:
        """Rows that go."""
        return tuple(row for row in self.rows if row.action == "delete")

    def describe(self) -> list[dict[str, Any]]:
        """Rows as plain values."""
        return [{**dataclasses.asdict(row), "reasons": list(row.reasons)} for row in self.rows]


def plan_retention(holdings: Holdings, policy: RetentionConfig, *, interval_tokens: int, now: float) -> RetentionPlan:
    """What stays and what goes of ``holdings``. ``interval_tokens`` lie between snapshots, ``now`` is in Unix seconds."""
    keep = join_reasons(
        holdings.needed,
        reasons_of_policy(holdings.snapshots, policy, interval_tokens=interval_tokens, now=now),
        reasons_of_health(holdings.snapshots, holdings.reach),
    )
    rows = [_row(f"snapshots/{folder_of(glance)}", glance, keep, _why_gone(glance)) for glance in holdings.snapshots]
    left = [(f"snapshots/{folder_of(glance)}", glance) for glance in holdings.left_behind]
    left_merges = [(f"merged/{name}", glance) for name, glance in holdings.left_behind_merges.items()]
    keep_left = join_reasons(holdings.needed, reasons_of_age([*left, *left_merges], policy, now=now))
    rows += [_row(folder, glance, keep_left, LEFT_BEHIND) for folder, glance in left]
    merges = [_row(folder, glance, keep_left, LEFT_BEHIND) for folder, glance in left_merges]
    for name, glance in holdings.merged.items():
        own = {} if name in holdings.surplus else {f"merged/{name}": ["merged checkpoint"]}
        merges.append(_row(f"merged/{name}", glance, join_reasons(own, keep), "beyond keep_last of its schedule row"))
    return RetentionPlan(rows=(*rows, *sorted(merges, key=lambda row: row.name)))


def reasons_of_policy(
    snapshots: Sequence[Glance], policy: RetentionConfig, *, interval_tokens: int, now: float
) -> dict[str, list[str]]:
    """What the rules of the configuration keep; without a rule, everything. Ephemeral snapshots are no matter of rules."""
    found: dict[str, list[str]] = {}
    snapshots = _lasting(snapshots)
    newest = {snapshot.url for snapshot in snapshots[-policy.keep_last :]} if policy.keep_last else set()
    for snapshot in snapshots:
        age_hours = (now - snapshot.created) / 3600
        spacing = (policy.keep_every or 0) * interval_tokens
        rules = {
            "no retention rule is set": not policy.is_set,
            # Its weights lie with another trainer: removing our note of it would free nothing.
            "adopted": snapshot.kind == "adopted",
            "milestone": snapshot.step in policy.milestones,
            f"one of the last {policy.keep_last}": snapshot.url in newest,
            f"every {policy.keep_every}": bool(spacing) and (snapshot.tokens_seen or 0) % spacing == 0,
            f"younger than {policy.keep_hours} h": policy.keep_hours is not None and age_hours < policy.keep_hours,
        }
        found[f"snapshots/{folder_of(snapshot)}"] = [rule for rule, holds in rules.items() if holds]
    return found


def reasons_of_age(
    left_behind: Iterable[tuple[str, Glance]], policy: RetentionConfig, *, now: float
) -> dict[str, list[str]]:
    """Why what a recovery left behind, by folder, stays for now.

    As evidence: as long as the policy's age says, and always without a policy. Ephemeral snapshots are none.
    """
    found: dict[str, list[str]] = {}
    for folder, glance in left_behind:
        if glance.ephemeral:
            continue
        is_young = policy.keep_hours is not None and (now - glance.created) / 3600 < policy.keep_hours
        rules = {"no retention rule is set": not policy.is_set, f"younger than {policy.keep_hours} h": is_young}
        found[folder] = [rule for rule, holds in rules.items() if holds]
    return found


def reasons_of_health(snapshots: Sequence[Glance], reach: SpikeReach | None = None) -> dict[str, list[str]]:
    """The newest, to resume from; of the lasting ones the newest healthy, and those to recover from.

    These are the last three before the last non-finite step and, for a spike that is not found yet, what ``reach`` says:
    the last ``reach.count`` up to its limit for the last try, and all after it for the tries before and for spikes to come.
    """
    newest, snapshots = snapshots[-1:], _lasting(snapshots)
    healthy = [snapshot for snapshot in snapshots if snapshot.healthy]
    found = [(newest, "newest: training resumes here"), (healthy[-1:], "newest healthy")]
    sick = [i for i, snapshot in enumerate(snapshots) if not snapshot.healthy]
    if sick:
        onset = next(i for i in reversed(sick) if i == 0 or snapshots[i - 1].healthy)
        before = [snapshot for snapshot in snapshots[:onset] if snapshot.healthy]
        found.append((before[-RECOVERY_COUNT:], "healthy before the last spike"))
    if reach is not None:
        trained = [snapshot for snapshot in healthy if snapshot.kind == "training"]
        early = [snapshot for snapshot in trained if (snapshot.tokens_seen or 0) <= reach.limit_tokens]
        found.append(([*early[-reach.count :], *trained[len(early) :]], "a recovery from a spike may need it"))
    return join_reasons(*({f"snapshots/{folder_of(s)}": [why] for s in chosen} for chosen, why in found))


def reasons_of_starts(starts: Mapping[str, StartPoint], holdings: Iterable[tuple[str, Glance]]) -> dict[str, list[str]]:
    """Checkpoints that branches (by name) began with, by URL or, in a run that was moved, by digest and step.

    A branch that began with weights alone does not say of which step they were.
    """
    return {
        folder: [f"start of branch {name}"]
        for folder, glance in holdings
        for name, start in starts.items()
        if start.url == glance.url
        or (start.digest == glance.digest and (start.weights_only or start.step == glance.step))
    }


def reasons_of_recoveries(starts: Mapping[int, StartPoint], merges: Iterable[str]) -> dict[str, list[str]]:
    """Merges (by name) from which recoveries (by number) went on: the run's history, also where that way was left again."""
    # By name, so that a run that was moved keeps its starts.
    places = {number: checkpoint_name(start.url) for number, start in starts.items()}
    numbers = {place[1]: number for number, place in places.items() if place is not None}
    folders = [f"merged/{name}" for name in merges]
    return {folder: [f"start of recovery {numbers[folder]}"] for folder in folders if folder in numbers}


def reasons_of_segments(segments: Sequence[Mapping[str, Any]], snapshots: Sequence[Glance]) -> dict[str, list[str]]:
    """Where segments that are open began."""
    starts = {segment["start"]["step"]: segment["segment"] for segment in segments if segment["end"] is None}
    return {
        f"snapshots/{folder_of(snapshot)}": [f"start of open segment {starts[snapshot.step]}"]
        for snapshot in snapshots
        if snapshot.step in starts
    }


def reasons_of_registered(
    digests: Collection[str], merges: Iterable[Glance], holdings: Iterable[tuple[str, Glance]]
) -> dict[str, list[str]]:
    """Merges that are registered as model versions, and their inputs, from which they can be made again."""
    inputs: dict[str, str] = {}
    for merge in merges:
        if merge.digest in digests:
            # By name, so that a run that was moved keeps what it needs.
            places = [checkpoint_name(url) for url in merge.inputs]
            inputs |= {place[1]: folder_of(merge) for place in places if place is not None}
    found: dict[str, list[str]] = {}
    for folder, glance in holdings:
        if glance.kind == "merged" and glance.digest in digests:
            found.setdefault(folder, []).append("registered model version")
        if folder in inputs:
            found.setdefault(folder, []).append(f"input of registered {inputs[folder]}")
    return found


def join_reasons(*parts: Reasons) -> dict[str, list[str]]:
    """All reasons of each folder, each once."""
    joined: dict[str, list[str]] = {}
    for part in parts:
        for folder, reasons in part.items():
            have = joined.setdefault(folder, [])
            have += [reason for reason in reasons if reason not in have]
    return joined


def folder_of(glance: Glance) -> str:
    """Name of a checkpoint's own folder."""
    return glance.url.rsplit("/", 1)[1]


def _lasting(snapshots: Sequence[Glance]) -> list[Glance]:
    """All but those that are there to resume from alone."""
    return [snapshot for snapshot in snapshots if not snapshot.ephemeral]


def _why_gone(glance: Glance) -> str:
    return "ephemeral, and a later snapshot is committed" if glance.ephemeral else "no rule keeps it"


def _row(name: str, glance: Glance, keep: Reasons, otherwise: str) -> RetentionRow:
    reasons = tuple(keep.get(name, ()))
    return RetentionRow(
        name=name,
        url=glance.url,
        step=glance.step,
        bytes=0 if glance.kind == "adopted" else glance.bytes,
        digest=glance.digest,
        created=glance.created,
        action="keep" if reasons else "delete",
        reasons=reasons or (otherwise,),
    )
