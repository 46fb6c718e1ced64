"""Durable steps: done once, recorded last, refused with a difference when asked for with other values."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from cluster.errors import LeaseLost, StorageError
from cluster.lease import Lease
from cluster.storage import Store, open_store
from pipelines.steps import FOLDER, Step, StepChanged, fingerprints_of, pending_steps, read_records, run_steps
from tests.faulty_store import FaultyStore


@dataclass
class Bench:
    """What the steps of these tests work on."""

    done: list[str] = field(default_factory=list)
    """Steps whose functions ran, in order."""
    gone: set[str] = field(default_factory=set)
    """Steps whose output is missing."""
    raises: dict[str, BaseException] = field(default_factory=dict)
    """What a step's function raises."""


def step(name: str, *needs: str, config: Mapping[str, Any] | None = None, version: int = 1) -> Step[Bench]:
    def work(bench: Bench) -> dict[str, Any]:
        if name in bench.raises:
            raise bench.raises[name]
        bench.done.append(name)
        bench.gone.discard(name)
        return {"by": name}

    return Step(
        name=name,
        version=version,
        config=config or {"tokens": 100},
        needs=needs,
        function=work,
        is_standing=lambda bench, result: result["by"] not in bench.gone,
    )


GRAPH = (step("train"), step("merge", "train"), step("evaluate", "train", "merge"))


@pytest.fixture(params=["memory", "path"])
def store(request: pytest.FixtureRequest, tmp_path: Any) -> Store:
    return open_store(f"memory://steps-{tmp_path.name}" if request.param == "memory" else str(tmp_path / "run"))


@pytest.fixture
def run(store: Store) -> Callable[..., dict[str, Any]]:
    """Run steps as a driver that holds the lease."""

    def drive(steps: Sequence[Step[Bench]], bench: Bench) -> dict[str, Any]:
        lease = Lease(store, "run")
        lease.acquire()
        try:
            return run_steps(store, steps, bench, lease)
        finally:
            lease.release()

    return drive


def test_steps_run_in_order_and_leave_one_record_each(store: Store, run: Callable[..., Any]) -> None:
    bench = Bench()
    records = run(GRAPH, bench)
    assert bench.done == ["train", "merge", "evaluate"]
    assert store.keys(FOLDER) == ["steps/evaluate@1.json", "steps/merge@1.json", "steps/train@1.json"]
    stored = json.loads(store.read("steps/merge@1.json"))
    assert stored["config"] == {"tokens": 100}
    assert stored["result"] == {"by": "merge"}
    assert stored["needs"] == {"train": records["train"].fingerprint}
    assert stored["fingerprint"] == fingerprints_of(GRAPH)["merge"]


def test_steps_that_are_done_are_not_done_again(run: Callable[..., Any]) -> None:
    run(GRAPH, Bench())
    again = Bench()
    assert {name: record.result["by"] for name, record in run(GRAPH, again).items()} == {
        "train": "train", "merge": "merge", "evaluate": "evaluate",
    }  # fmt: skip
    assert again.done == []


def test_failed_step_leaves_no_record_and_the_next_driver_goes_on_there(store: Store, run: Callable[..., Any]) -> None:
    bench = Bench(raises={"merge": StorageError("the disk is full")})
    with pytest.raises(StorageError, match="full"):
        run(GRAPH, bench)
    assert store.keys(FOLDER) == ["steps/train@1.json"]
    bench.raises.clear()
    run(GRAPH, bench)
    assert bench.done == ["train", "merge", "evaluate"]


def test_step_whose_output_is_gone_is_done_again_and_its_record_stands(store: Store, run: Callable[..., Any]) -> None:
    run(GRAPH, Bench())
    record = store.read("steps/merge@1.json")
    bench = Bench(gone={"merge"})
    assert [step.name for step in pending_steps(store, GRAPH, bench)] == ["merge"]
    run(GRAPH, bench)
    assert bench.done == ["merge"]
    assert store.read("steps/merge@1.json") == record


def test_changed_values_are_refused_with_every_difference_before_work(store: Store, run: Callable[..., Any]) -> None:
    run(GRAPH[:2], Bench())
    changed = [step("train", config={"tokens": 200, "seed": 1}), *GRAPH[1:]]
    bench = Bench()
    with pytest.raises(StepChanged) as caught:
        run(changed, bench)
    assert bench.done == []
    message = str(caught.value)
    assert "train: tokens: done with 100, asked for 200" in message
    assert "train: seed: done with None, asked for 1" in message
    assert "merge: it used train as it was done then" in message
    assert "--fork" in message


def test_changed_needs_are_named(run: Callable[..., Any]) -> None:
    run(GRAPH, Bench())
    with pytest.raises(StepChanged, match="evaluate: merge: no longer used"):
        run([GRAPH[0], GRAPH[1], step("evaluate", "train")], Bench())


def test_new_version_of_a_step_is_done_beside_the_old_record(store: Store, run: Callable[..., Any]) -> None:
    run(GRAPH[:1], Bench())
    bench = Bench()
    run([step("train", version=2)], bench)
    assert bench.done == ["train"]
    assert store.keys(FOLDER) == ["steps/train@1.json", "steps/train@2.json"]


@pytest.mark.parametrize("value", [object(), {1: 2}, float("nan"), b"bytes", {"x": {3}}], ids=str)
def test_fingerprint_of_values_that_json_cannot_say_is_refused(value: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        fingerprints_of([step("train", config={"value": value})])


def test_driver_that_lost_its_lease_records_nothing(store: Store) -> None:
    lease = Lease(store, "run")
    lease.acquire()
    other = Lease(store, "run", clock=lambda: time.time() + 3600)

    def take_over(_: Bench) -> dict[str, Any]:
        other.acquire()
        return {"by": "train"}

    with pytest.raises(LeaseLost):
        run_steps(store, [replace(step("train"), function=take_over)], Bench(), lease)
    assert store.keys(FOLDER) == []


def test_record_that_another_driver_made_meanwhile_is_taken(store: Store, run: Callable[..., Any]) -> None:
    def also_done_elsewhere(_: Bench) -> dict[str, Any]:
        run([step("train")], Bench())
        mine.acquire()
        return {"by": "me"}

    mine = Lease(store, "run")
    records = run_steps(store, [replace(step("train"), function=also_done_elsewhere)], Bench(), mine)
    assert records["train"].result == {"by": "train"}
    assert json.loads(store.read("steps/train@1.json"))["result"] == {"by": "train"}


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda record: {**record, "config": {"tokens": 101}}, "was edited"),
        (lambda record: {**record, "fingerprint": "0" * 64}, "was edited"),
        (lambda record: {key: value for key, value in record.items() if key != "needs"}, "needs"),
        (lambda record: {**record, "format_version": 9}, "format_version 9"),
        (lambda _: [], "damaged"),
    ],
    ids=["config", "fingerprint", "missing", "version", "list"],
)
def test_record_edited_by_hand_is_refused_by_name(
    store: Store, run: Callable[..., Any], edit: Callable[[Any], Any], reason: str
) -> None:
    run(GRAPH, Bench())
    store.put("steps/merge@1.json", json.dumps(edit(json.loads(store.read("steps/merge@1.json")))).encode())
    with pytest.raises(StorageError, match=reason) as caught:
        run(GRAPH, Bench())
    assert "merge@1.json" in str(caught.value)


def test_torn_record_is_refused_by_name(store: Store, run: Callable[..., Any]) -> None:
    run(GRAPH, Bench())
    store.put("steps/merge@1.json", store.read("steps/merge@1.json")[:-20])
    with pytest.raises(StorageError, match=r"merge@1\.json: the step record is damaged"):
        read_records(store, GRAPH)


def test_done_step_costs_few_requests(tmp_path: Any) -> None:
    """At most five a step are promised: a listing for all, one read a record; a new one also checks the lease and commits."""
    calls: list[str] = []

    def count(method: str, key: str) -> bool:
        calls.append(f"{method} {key}")
        return False

    inner = open_store(str(tmp_path / "run"))
    counting = FaultyStore(inner, count)
    lease = Lease(counting, "run")
    lease.acquire()
    calls.clear()
    run_steps(counting, GRAPH, Bench(), lease)
    assert len(calls) == 1 + 2 * len(GRAPH)
    calls.clear()
    run_steps(counting, GRAPH, Bench(), lease)
    assert len(calls) == 1 + len(GRAPH)
