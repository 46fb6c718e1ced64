"""`pma gc` on real run folders: what goes, a stop anywhere, and merges, ticks and branches at the same moment."""

from __future__ import annotations

import dataclasses
import functools
import json
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from retention_run import (
    HOUR,
    Clock,
    begin_run,
    broken,
    commit,
    make_run,
    small_config,
    snapshot_url,
    steps_left,
    visible,
)
from turns import Turns, watched

from cluster.errors import LeaseHeld, ObjectMissing, StorageDenied, StorageError
from cluster.journal import read_events
from cluster.lease import EXPIRY_SECONDS, Lease
from cluster.storage import Store, open_store
from cluster.storage_fsspec import MemoryStore
from cluster.storage_local import LocalStore
from configs.errors import ConfigError, UserError
from configs.merging import MergeConfig, RetentionConfig
from configs.schema import Config
from pipelines.gc import gc, survey
from pipelines.merge import carry_out
from pipelines.render_upkeep import render_gc
from pipelines.scheduled import due_now, make_merges
from pipelines.status import status
from pipelines.verify import verify
from tasks.checkpoints.attempts import GRACE_HOURS
from tasks.checkpoints.collect import collect
from tasks.checkpoints.dooms import read_dooms
from tasks.checkpoints.manifest import Source
from tasks.checkpoints.pins import GC_LEASE, SKEW_SECONDS, InputCollected, hold_pins, pins_in_force
from tasks.checkpoints.reader import open_checkpoint
from tasks.checkpoints.run_folder import RunFolder, snapshot_key
from tasks.merging.methods import MethodChoice
from tasks.merging.plan import plan_merge

IDLE = small_config(steps=6, merge=MergeConfig(count=50))
"""A schedule that needs nothing: of six snapshots five go."""
MERGING = small_config(steps=6, merge=MergeConfig(count=3, keep_last=2))


class Killed(BaseException):
    """The process is gone: none of its calls has an effect any more."""


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["local", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "run") if request.param == "local" else f"memory://{uuid.uuid4().hex}/run"


def in_this_thread(function: Callable[[Any], Any], tasks: Sequence[Any], is_lost: Callable[[], bool]) -> list[Any]:
    return [function(task) for task in tasks]


def tick(store: Store, config: Config) -> list[str]:
    """What a tick does to merges: those that are due, each under its lease and pins."""
    run = RunFolder(store.url)
    outcome = make_merges(run, config, due_now(run, config), in_this_thread)
    return sorted(url.rsplit("/", 1)[1] for url in outcome.merged)


def take_away(store: Store, config: Config, clock: Callable[[], float]) -> None:
    run = RunFolder(store.url)
    collect(store, lambda: survey(run, config, clock()), clock=clock)


def actions(result: dict[str, Any]) -> dict[str, str]:
    return {row["name"]: row["action"] for row in result["rows"]}


# What it says and does


def test_gc_plans_and_touches_nothing(url: str, clock: Clock) -> None:
    store = make_run(url, range(1, 7), IDLE)
    before = {key: store.read(key) for key in store.keys("") if not key.startswith("cache/")}
    result = gc(url, apply=False, clock=clock)
    assert [row["action"] for row in result["rows"]] == ["delete"] * 5 + ["keep"]
    assert result["deleted"] == []
    assert result["freed_bytes"] == sum(row["bytes"] for row in result["rows"][:5])
    assert {key: store.read(key) for key in store.keys("") if not key.startswith("cache/")} == before


def test_gc_apply_deletes_and_leaves_no_object_behind(url: str, clock: Clock) -> None:
    store = make_run(url, range(1, 7), IDLE)
    planned = gc(url, apply=False, clock=clock)
    result = gc(url, apply=True, clock=clock)
    assert result["deleted"] == [snapshot_url(store, step) for step in range(1, 6)]
    assert (result["freed_bytes"], result["kept_bytes"]) == (planned["freed_bytes"], planned["kept_bytes"])
    assert steps_left(store) == [6]
    assert store.folders("snapshots") == ["step-000000006"]
    assert broken(store) == []
    assert [event["collected"] for event in read_events(store)] == [[snapshot_key(step) for step in range(1, 6)]]
    json.dumps(result)


def test_gc_clears_what_a_killed_writer_left_in_the_folder(tmp_path: Path, clock: Clock) -> None:
    store = make_run(str(tmp_path / "run"), range(1, 3), IDLE)
    partial = tmp_path / "run" / snapshot_key(1) / ".model-00001-of-00002.safetensors.ab12.part"
    partial.write_bytes(b"half")
    gc(store.url, apply=True, clock=clock)
    assert store.folders("snapshots") == ["step-000000002"]


def test_gc_on_s3(s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in s3_environment.items():
        monkeypatch.setenv(key, value)
    store = make_run(f"s3://runs/{uuid.uuid4().hex}/run", range(1, 5), IDLE)
    doomed = [snapshot for snapshot in RunFolder(store.url).snapshots() if snapshot.step == 2]
    with hold_pins(doomed):
        gc(store.url, apply=True)
        assert steps_left(store) == [2, 4]
    assert not [key for key in store.keys("leases") if "pin-" in key]
    gc(store.url, apply=True)
    assert steps_left(store) == [4]
    assert broken(store) == []
    assert store.folders("snapshots") == ["step-000000004"]
    with pytest.raises(InputCollected), hold_pins(doomed):
        pytest.fail("the block ran")


def test_gc_again_has_nothing_to_do(url: str, clock: Clock) -> None:
    store = make_run(url, range(1, 7), IDLE)
    gc(url, apply=True, clock=clock)
    again = gc(url, apply=True, clock=clock)
    assert (again["deleted"], again["freed_bytes"]) == ([], 0)
    assert len(read_events(store)) == 1


def test_gc_without_a_rule_keeps_everything_and_says_so(url: str, clock: Clock) -> None:
    config = dataclasses.replace(IDLE, retention=RetentionConfig())
    store = make_run(url, range(1, 7), config)
    result = gc(url, apply=True, clock=clock)
    assert steps_left(store) == [1, 2, 3, 4, 5, 6]
    assert "no retention rule is set" in result["notes"][0]


def test_gc_rules_can_be_given(url: str, clock: Clock) -> None:
    store = make_run(url, range(1, 7), IDLE)
    gc(url, apply=True, overrides=("retention.keep_last=2", "retention.milestones=[1]"), clock=clock)
    assert steps_left(store) == [1, 5, 6]
    with pytest.raises(ConfigError, match=r"training\.batch_tokens"):
        gc(url, apply=True, overrides=("training.batch_tokens=200",), clock=clock)


def test_gc_of_no_run_is_the_users_mistake(url: str, clock: Clock) -> None:
    with pytest.raises(UserError, match="holds no run"):
        gc(url, apply=False, clock=clock)


def test_gc_while_another_is_at_work_touches_nothing(url: str, clock: Clock) -> None:
    store = make_run(url, range(1, 7), IDLE)
    Lease(store, GC_LEASE, clock).acquire()
    with pytest.raises(LeaseHeld):
        gc(url, apply=True, clock=clock)
    assert len(steps_left(store)) == 6


def test_gc_of_a_run_that_cannot_be_written_says_so(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_run(str(tmp_path / "run"), range(1, 7), IDLE)

    def refuse(*_: object) -> None:
        raise StorageDenied("read-only")

    monkeypatch.setattr(LocalStore, "create", refuse)
    with pytest.raises(StorageDenied, match="read-only"):
        gc(store.url, apply=True, clock=clock)
    assert len(steps_left(store)) == 6


def test_gc_renders_for_people(url: str, clock: Clock) -> None:
    make_run(url, range(1, 7), IDLE)
    plan = render_gc(gc(url, apply=False, clock=clock))
    assert "would free" in plan
    assert "no rule keeps it" in plan
    assert "--apply" in plan
    assert "freed" in render_gc(gc(url, apply=True, clock=clock))


# Who needs what


def test_gc_keeps_what_is_due_until_it_is_merged(url: str, clock: Clock) -> None:
    store = make_run(url, range(1, 7), MERGING)
    gc(url, apply=True, clock=clock)
    # Of the row's merges the two newest are kept, so that only they are due.
    assert steps_left(store) == [3, 4, 5, 6]
    assert tick(store, MERGING) == ["sma-n3-v100-step-000000005", "sma-n3-v100-step-000000006"]
    gc(url, apply=True, clock=clock)
    assert steps_left(store) == [6]
    assert status(url)["due"] == []


def test_gc_adopted_snapshots_and_their_sources_stay(tmp_path: Path, clock: Clock) -> None:
    store = make_run(str(tmp_path / "run"), [], IDLE)
    for step in (1, 2, 3):
        source = tmp_path / f"trainer/{step}"
        commit(store, step, kind="adopted", source=Source(url=str(source), format="hf"))
    gc(store.url, apply=True, clock=clock)
    assert steps_left(store) == [1, 2, 3]


def test_gc_keeps_registered_merges_and_their_inputs(url: str, clock: Clock) -> None:
    store = make_run(url, range(1, 7), dataclasses.replace(MERGING, merge=MergeConfig(count=3, keep_last=1)))
    config = RunFolder(url).identity().config
    run = RunFolder(url)
    all_rows = dataclasses.replace(config, merge=MergeConfig(count=3))
    tick(store, all_rows)
    digest = run.merged()["sma-n3-v100-step-000000004"].digest
    store.put("tracking/cursor.json", json.dumps({"sqlite:///x": {"items": [f"version/{digest}"]}}).encode())
    gc(url, apply=True, clock=clock)
    assert steps_left(store) == [2, 3, 4, 6]
    assert sorted(name for name in visible(store) if name.startswith("merged/")) == [
        "merged/sma-n3-v100-step-000000004",
        "merged/sma-n3-v100-step-000000006",
    ]
    assert verify(f"{url}/merged/sma-n3-v100-step-000000004")["ok"]


def test_gc_damaged_record_of_registered_versions_deletes_nothing(url: str, clock: Clock) -> None:
    store = make_run(url, range(1, 7), IDLE)
    store.put("tracking/cursor.json", b"[1]")
    with pytest.raises(StorageError, match="nothing is deleted"):
        gc(url, apply=True, clock=clock)
    assert len(steps_left(store)) == 6


def test_gc_keeps_starts_of_branches_and_open_segments_and_leaves_branches_alone(url: str, clock: Clock) -> None:
    store = make_run(url, range(1, 7), IDLE)
    start = {"url": snapshot_url(store, 2), "digest": "d", "step": 2, "tokens_seen": 200}
    branch = store.child("branches/anneal")
    begin_run(branch, IDLE, start)
    for step in (3, 4, 5):
        commit(branch, step)
    RunFolder(url).open_segment(cause="resume", start={"step": 4}, plan={})
    result = gc(url, apply=True, clock=clock)
    assert steps_left(store) == [2, 4, 6]
    assert steps_left(branch) == [3, 4, 5]
    assert "1 branch(es) are runs of their own" in result["notes"][-1]
    gc(branch.url, apply=True, clock=clock)
    assert steps_left(branch) == [5]
    assert steps_left(store) == [2, 4, 6]


def test_gc_beside_a_driver_keeps_what_it_is_yet_to_evaluate(url: str, clock: Clock) -> None:
    store = make_run(url, range(1, 7), IDLE)
    driver = Lease(store, "run", clock)
    driver.acquire()
    gc(url, apply=True, clock=clock)
    assert len(steps_left(store)) == 6
    driver.release()
    gc(url, apply=True, clock=clock)
    assert steps_left(store) == [6]


def test_gc_merge_that_was_taken_away_is_not_made_again(url: str, clock: Clock) -> None:
    """Its inputs may all still be there: what is done stays done."""
    config = small_config(
        steps=9, merge=MergeConfig(count=2, interval_tokens=200, keep_last=1), retention=RetentionConfig(keep_every=2)
    )
    store = make_run(url, [], config)
    for step in range(1, 10):
        commit(store, step)
        tick(store, config)
        gc(url, apply=True, clock=clock)
    assert steps_left(store) == [2, 4, 6, 8, 9]
    merges = [name for name in visible(store) if name.startswith("merged/")]
    assert merges == ["merged/sma-n2-v200-step-000000009"]
    assert tick(store, config) == []
    assert status(url)["due"] == []


def test_a_half_collected_snapshot_makes_no_merge_due_whatever_a_driver_remembers(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder is still listed, and the driver read its manifest before; else it would try that merge for ever."""
    # As over a network, where a folder that is listed stands for the manifest that was read.
    monkeypatch.setattr(LocalStore, "reads_ahead", True)
    store = make_run(str(tmp_path / "run"), range(1, 4), IDLE)
    run, merging = RunFolder(store.url), dataclasses.replace(IDLE, merge=MergeConfig(count=3))
    assert len(due_now(run, merging)) == 1

    def stop(_: Store, method: str, key: str) -> None:
        if method == "delete" and key.endswith("manifest.json"):
            raise Killed

    with watched(LocalStore, lambda *_: None, stop), pytest.raises(Killed):
        take_away(store, IDLE, clock)
    assert len(run.glances()) == 3, "what the driver remembers"
    assert store.folders("snapshots") == ["step-000000001", "step-000000002", "step-000000003"]
    assert due_now(run, merging) == []


# A merge whose inputs are gone


def test_verify_merge_of_collected_inputs_holds_and_says_what_it_could_not_check(url: str, clock: Clock) -> None:
    store = make_run(url, range(1, 7), MERGING)
    tick(store, MERGING)
    gc(url, apply=True, clock=clock)
    checked = verify(f"{url}/merged/sma-n3-v100-step-000000005")
    assert checked["ok"], checked
    assert checked["checks"]["recomputed sample"]["skipped"]
    assert "collected by retention" in checked["checks"]["recomputed sample"]["reason"]
    for check in ("lineage", "census", "weights"):
        assert checked["checks"][check] == {"ok": True, "reason": None}


def test_verify_notices_a_lie_about_collected_inputs(tmp_path: Path, clock: Clock) -> None:
    store = make_run(str(tmp_path / "run"), range(1, 7), MERGING)
    tick(store, MERGING)
    gc(store.url, apply=True, clock=clock)
    key = "merged/sma-n3-v100-step-000000005/manifest.json"
    honest = json.loads(store.read(key))
    for change in (
        {"weights": [0.5, 0.25, 0.25]},
        {"inputs": [{**honest["inputs"][0], "manifest_digest": "0" * 64}, *honest["inputs"][1:]]},
        {"inputs": [{**honest["inputs"][0], "url": honest["inputs"][1]["url"]}, *honest["inputs"][1:]]},
    ):
        store.put(key, json.dumps({**honest, **change}).encode())
        assert not verify(f"{store.url}/merged/sma-n3-v100-step-000000005")["ok"], change


def test_verify_input_that_vanished_without_retention_is_a_problem(url: str, clock: Clock) -> None:
    store = make_run(url, range(1, 7), MERGING)
    tick(store, MERGING)
    for key in store.keys(snapshot_key(4)):
        store.delete(key)
    checked = verify(f"{url}/merged/sma-n3-v100-step-000000005")
    assert not checked["ok"]
    assert "no checkpoint here" in checked["problems"][0]


# Attempts that were never committed


def test_gc_attempts_go_after_a_day_without_change_and_without_a_writer(url: str, clock: Clock) -> None:
    store = make_run(url, [6], IDLE)
    left = ["snapshots/step-000000007/model-00001-of-00001.safetensors", "merged/x/receipts/attempt"]
    for key in left:
        store.put(key, b"half")
    assert gc(url, apply=True, clock=clock)["deleted"] == []
    clock.now += GRACE_HOURS * HOUR - 1
    store.put(left[1], b"more")  # somebody wrote there
    assert gc(url, apply=True, clock=clock)["deleted"] == []
    clock.now += 1
    writer = Lease(store, "run", clock)
    writer.acquire()
    assert gc(url, apply=True, clock=clock)["deleted"] == []
    writer.release()
    assert gc(url, apply=True, clock=clock)["deleted"] == [f"{url}/snapshots/step-000000007"]
    assert store.exists(left[1])
    clock.now += GRACE_HOURS * HOUR
    assert gc(url, apply=True, clock=clock)["deleted"] == [f"{url}/merged/x"]
    assert steps_left(store) == [6]


# Stopped anywhere


def copy_of(store: Store) -> Store:
    """The same run elsewhere in memory."""
    copy = open_store(f"memory://{uuid.uuid4().hex}/run")
    for key in store.keys(""):
        copy.put(key, store.read(key))
    return copy


def count_calls(prepare: Callable[[], tuple[Store, Callable[[], object]]]) -> int:
    """Calls to storage that one undisturbed collection makes."""
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    _, work = prepare()
    with watched(MemoryStore, count):
        work()
    return calls


def kill_at(number: int, work: Callable[[], object], *, after: bool) -> None:
    """Do ``work``; its process dies before or right after its call ``number``."""
    calls = 0

    def before_call(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls > number or (calls == number and not after):
            raise Killed

    def after_call(*_: object) -> None:
        if calls >= number:
            raise Killed

    with pytest.raises(Killed), watched(MemoryStore, before_call, after_call):
        work()


@pytest.mark.parametrize("after", [False, True], ids=["request lost", "answer lost"])
def test_gc_killed_at_any_call_leaves_nothing_half_visible_and_the_next_finishes(after: bool) -> None:
    config = small_config(steps=4, merge=MergeConfig(count=3, keep_last=1))

    made = make_run(f"memory://{uuid.uuid4().hex}/run", range(1, 5), config)
    tick(made, dataclasses.replace(config, merge=MergeConfig(count=3)))

    def prepare() -> tuple[Store, Callable[[], object]]:
        store = copy_of(made)
        clock = Clock()
        return store, lambda: take_away(store, config, clock)

    for number in range(1, count_calls(prepare) + 1):
        store, work = prepare()
        kill_at(number, work, after=after)
        assert broken(store) == [], number
        later = Clock(Clock().now + EXPIRY_SECONDS + SKEW_SECONDS + 1)
        assert RunFolder(store.url).snapshots()[-1].step == 4
        take_away(store, config, later)
        assert steps_left(store) == [4], number
        assert [name for name in visible(store) if name.startswith("merged/")] == ["merged/sma-n3-v100-step-000000004"]
        left = {key.rsplit("/", 1)[0] for key in store.keys("") if key.startswith(("snapshots/", "merged/"))}
        assert left == set(visible(store)), number
        assert broken(store) == [], number
        assert all(doom.collected_at is not None for doom in read_dooms(store).values()), number


def test_gc_killed_at_any_call_never_blocks_a_reader_for_ever_and_never_robs_it() -> None:
    made = make_run(f"memory://{uuid.uuid4().hex}/run", range(1, 4), IDLE)

    def prepare() -> tuple[Store, Callable[[], object]]:
        store = copy_of(made)
        clock = Clock()
        return store, lambda: take_away(store, IDLE, clock)

    saved = 0
    for number in range(1, count_calls(prepare) + 1):
        store, work = prepare()
        wanted = [snapshot for snapshot in RunFolder(store.url).snapshots() if snapshot.step == 2]
        kill_at(number, work, after=True)
        later = Clock(Clock().now + EXPIRY_SECONDS + SKEW_SECONDS + 1)
        was_there = 2 in steps_left(store)
        try:
            with hold_pins(wanted, clock=later):
                assert was_there, number
                take_away(store, IDLE, later)
                assert 2 in steps_left(store), number
                saved += 1
        except InputCollected:
            assert not was_there, number
        assert broken(store) == [], number
    assert saved


def test_gc_control_shards_before_the_manifest_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check above can fail: a collection in the wrong order leaves half a snapshot visible when it is stopped."""
    from tasks.checkpoints import collect as module

    store = make_run(f"memory://{uuid.uuid4().hex}/run", range(1, 3), IDLE)
    real = module._delete_listed

    def shards_first(*arguments: Any) -> None:
        real(*arguments)
        raise Killed

    monkeypatch.setattr(MemoryStore, "delete", _but_manifests(MemoryStore.delete))
    monkeypatch.setattr(module, "_delete_listed", shards_first)
    with pytest.raises(Killed):
        take_away(store, IDLE, Clock())
    assert broken(store)


def _but_manifests(delete: Callable[[Any, str], None]) -> Callable[[Any, str], None]:
    return lambda self, key: None if key.endswith("manifest.json") else delete(self, key)


# A merge, a tick, a trainer and a collection at the same moment


class Guard:
    """Looks at every deletion: no object of a visible manifest, and no manifest that is pinned at that moment, may go."""

    def __init__(self, store: Store, clock: Callable[[], float]) -> None:
        self.store, self.clock = store, clock
        self.violations: list[str] = []

    def __call__(self, _: Store, method: str, key: str) -> None:
        folder, _, name = key.rpartition("/")
        if method != "delete" or not folder.startswith(("snapshots/", "merged/")):
            return
        if name == "manifest.json":
            if folder in pins_in_force(self.store, self.clock()):
                self.violations.append(f"{key} was deleted while it was pinned")
        elif self.store.exists(f"{folder}/manifest.json") and "receipts" not in folder:
            self.violations.append(f"{key} was deleted while its manifest was visible")


def race(
    seed: int, store: Store, clock: Clock, programs: dict[str, Callable[[], object]]
) -> tuple[dict[str, Any], list[str]]:
    guard, turns = Guard(store, clock), Turns(seed)

    def before(called: Store, method: str, key: str) -> None:
        full = f"{called.url}/{key}".removeprefix(f"{store.url}/")
        turns.step(method, full)
        guard(called, method, full)

    with watched(type(store), before):
        results = turns.run(programs)
    assert guard.violations == [], (seed, turns.trace[-40:])
    assert broken(store) == [], seed
    return results, turns.trace


def race_of_ticks(seed: int, store: Store, config: Config) -> None:
    """Two ticks and a collection at once: no merge is made twice, none fails."""
    tick_once = functools.partial(tick, store, config)
    results, trace = race(
        seed,
        store,
        time.time,
        {"a": tick_once, "b": tick_once, "gc": functools.partial(take_away, store, config, time.time)},
    )
    errors = [result for result in results.values() if isinstance(result, Exception)]
    assert not errors, (seed, errors, trace[-30:])
    made = results["a"] + results["b"]
    assert len(made) == len(set(made)), seed


@pytest.mark.parametrize("kind", ["memory", "local"])
def test_race_two_ticks_and_a_gc_make_each_due_merge_once(kind: str, tmp_path: Path) -> None:
    config = dataclasses.replace(MERGING, merge=MergeConfig(count=3))
    for seed in range(20):
        where = f"memory://{uuid.uuid4().hex}" if kind == "memory" else str(tmp_path / f"{seed}")
        store = make_run(f"{where}/run", range(1, 6), config)
        race_of_ticks(seed, store, config)
        tick(store, config)
        assert set(RunFolder(store.url).merged()) == {f"sma-n3-v100-step-{step:09d}" for step in (3, 4, 5)}, seed


def test_race_a_trainer_commits_while_ticks_and_gc_work() -> None:
    config = small_config(steps=8, merge=MergeConfig(count=3))
    for seed in range(12):
        store = make_run(f"memory://{uuid.uuid4().hex}/run", range(1, 4), config)
        programs = {
            "train": functools.partial(repeat, [functools.partial(commit, store, step) for step in range(4, 9)]),
            "tick": functools.partial(repeat, 3 * [functools.partial(tick, store, config)]),
            "gc": functools.partial(repeat, 3 * [functools.partial(take_away, store, config, time.time)]),
        }
        results, trace = race(seed, store, time.time, programs)
        errors = [result for result in results.values() if isinstance(result, Exception)]
        assert not errors, (seed, errors, trace[-30:])
        tick(store, config)
        assert set(RunFolder(store.url).merged()) == {f"sma-n3-v100-step-{step:09d}" for step in range(3, 9)}, seed
        take_away(store, config, time.time)
        assert steps_left(store) == [8], seed


def repeat(works: Sequence[Callable[[], object]]) -> None:
    for work in works:
        work()


def merge_by_hand(store: Store, output: str) -> str:
    """What `pma merge` does to snapshots that no schedule needs."""
    inputs = [open_checkpoint(snapshot_url(store, step)) for step in (2, 3)]
    carry_out("local", [plan_merge(inputs, MethodChoice(method="sma"), output_url=output)])
    return "merged"


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Merge tasks run on the merge's own thread, so that every read takes its turn."""
    monkeypatch.setattr(
        "pipelines.merge.fan_out_local", lambda function, tasks, **_: [function(task) for task in tasks]
    )


def race_of_merges(kind: str, tmp_path: Path) -> Iterator[Any]:
    """What became of a merge of doomed snapshots beside a collection, over and over."""
    for seed in range(30):
        where = f"memory://{uuid.uuid4().hex}" if kind == "memory" else str(tmp_path / f"{seed}")
        store = make_run(f"{where}/run", range(1, 6), IDLE)
        programs = {
            "gc": functools.partial(take_away, store, IDLE, time.time),
            "merge": functools.partial(merge_by_hand, store, f"{where}/out"),
        }
        results, _ = race(seed, store, time.time, programs)
        assert results["gc"] is None, results["gc"]
        if results["merge"] == "merged":
            assert verify(f"{where}/out")["ok"]
        yield results["merge"]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", ["memory", "local"])
def test_race_merge_by_hand_ends_well_or_begins_nothing(kind: str, tmp_path: Path) -> None:
    outcomes = list(race_of_merges(kind, tmp_path))
    # Refused by name; or it came too late even to open a checkpoint there.
    fair = [outcome == "merged" or isinstance(outcome, UserError) for outcome in outcomes]
    assert all(fair), outcomes
    assert not any("while it was read" in str(outcome) for outcome in outcomes)
    assert {"str", "InputCollected"} <= {type(outcome).__name__ for outcome in outcomes}


@pytest.mark.usefixtures("one_thread")
def test_race_control_a_merge_without_pins_is_robbed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("pipelines.merge.hold_pins", lambda _: nullcontext())
    assert any(isinstance(outcome, ObjectMissing) for outcome in race_of_merges("memory", tmp_path))


def test_processes_a_merge_and_two_collections_at_once(pma: Callable[..., Any], tmp_path: Path) -> None:
    store = make_run(
        str(tmp_path / "run"), range(1, 31), dataclasses.replace(IDLE, training=small_config(steps=30).training)
    )
    inputs = [snapshot_url(store, step) for step in range(5, 25)]
    commands = [
        ("merge", "--inputs", *inputs, "--output", str(tmp_path / "out"), "--json"),
        ("gc", "--run", store.url, "--apply", "--json"),
        ("gc", "--run", store.url, "--apply", "--json"),
    ]
    with ThreadPoolExecutor(3) as pool:
        merged, *collected = pool.map(lambda command: pma(*command), commands)
    assert {0} <= {answer.code for answer in collected} <= {0, 75}, [answer.stderr for answer in collected]
    assert broken(store) == []
    if merged.code == 0:
        assert verify(str(tmp_path / "out"))["ok"]
    else:
        assert merged.code == 2, merged.stderr
        assert not (tmp_path / "out/manifest.json").exists()
    again = pma("gc", "--run", store.url, "--apply", "--json")
    assert again.code == 0
    assert steps_left(store) == [30]
    assert pma("status", "--run", store.url, "--json").json["leases"] == []
