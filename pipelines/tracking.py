"""Forward what the run folder holds to MLflow: journal, merges, evaluations, registered versions.

The run folder is the truth and this is a copy: a cursor beside it says what was sent, so that an
MLflow that was away is brought up to date by any later command.

Tree in MLflow: the run; below it one child per segment, one for merges, one for evaluations and one per
branch (:mod:`pipelines.tracked.tree`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.errors import StorageError
from cluster.journal import journal_keys, read_journal_object
from cluster.storage import scheme_of
from cluster.tracking import Point, Tracker, TrackingAway
from configs.load import config_to_dict, identity_of
from configs.schema import Config
from pipelines.tracked import datasets, registration
from pipelines.tracked.charts import COMPARISONS, Evidence, draw, pending_charts
from pipelines.tracked.notes import NOTE_TAG, PARTS, describe_run, describe_segment
from pipelines.tracked.tree import kind_of, name_of, parent_of
from pipelines.wording import describe_event
from tasks.checkpoints.manifest import Manifest
from tasks.checkpoints.run_folder import RUN_KEY, RunFolder
from tasks.evaluation.held_out import read_evaluation, suite_of

CURSOR_KEY = "tracking/cursor.json"
NOTED_EVENTS = ("spike", "recovery", "recovered", "spike-unanswered")
"""Kinds of events that a tracked run is annotated with."""
LARGEST_TAG = 4000
SQLITE = "sqlite:///"
POLL_SECONDS = 4.0
FINAL_WAIT_SECONDS = 30.0
logger = logging.getLogger(__name__)


@dataclass
class Cursor:
    """What one tracking server has been sent."""

    runs: dict[str, str] = field(default_factory=dict)
    """Our key of a run (``run``, ``segment/1``, ``merges``, ...) to its MLflow id."""
    journals: list[str] = field(default_factory=list)
    """Journal objects sent."""
    items: list[str] = field(default_factory=list)
    """Merges, evaluations, versions, datasets and artifacts sent."""
    decisions: dict[str, Any] = field(default_factory=dict)
    """Promotions of registered versions, decided, by digest."""
    notes: dict[str, str] = field(default_factory=dict)
    """Descriptions that our runs have, by our key."""


class Forwarder:
    """Sends what is new in a run and its branches to MLflow."""

    def __init__(self, run: RunFolder, config: Config, tracker: Tracker) -> None:
        self.run = run
        self.config = config
        self.tracker = tracker
        self.suite = suite_of(config)
        self._all_cursors: dict[str, Any] = json.loads(run.store.read_if_present(CURSOR_KEY) or b"{}")
        self.cursor = Cursor(**self._all_cursors.get(tracker.uri, {}))
        self.registrar = registration.Registrar(run, config, tracker, self.cursor.decisions, self._save)

    def forward(self) -> int:
        """Send everything that is pending; returns the number of items sent.

        Raises :class:`cluster.tracking.TrackingAway`; what was sent until then is remembered.
        """
        before = self._count()
        try:
            for run, prefix in self._folders():
                self._forward_run(run, prefix)
            if self._count() > before:
                self._describe()
        finally:
            self._save()
        return self._count() - before

    def forward_charts(self) -> None:
        """Draw and send what charts are due; matplotlib serves one thread, so nobody may draw meanwhile."""
        try:
            for run, prefix, item in self._pending_charts():
                evidence = self._draw(run, item)
                for path, text in evidence.artifacts.items() if evidence else ():
                    self.tracker.log_text(self._run_id(_key_of(prefix)), text, path)
                if evidence and evidence.points:
                    self.tracker.log_points(self._run_id(_key_of(prefix)), evidence.points)
                self.cursor.items.append(prefix + item)
        finally:
            self._save()

    def lag(self) -> int:
        """Items in the run folder that MLflow has not been sent."""
        waiting = sum(
            len(self._pending_journals(run, prefix)) + len(self._pending_items(run, prefix))
            for run, prefix in self._folders()
        )
        return waiting + len(self._pending_charts())

    def finish(self, status: str) -> None:
        """Mark every run of the tree as ended."""
        for run_id in self.cursor.runs.values():
            self.tracker.end_run(run_id, status)

    def log_artifact(self, text: str, path: str) -> None:
        """Store an artifact in the top run."""
        self.tracker.log_text(self._run_id("run"), text, path)

    def _folders(self) -> list[tuple[RunFolder, str]]:
        """The run and its branches, with what stands before the names of their items."""
        branches = {name: self.run.branch(name) for name in self.run.branches()}
        begun = [(run, f"branches/{name}/") for name, run in branches.items() if run.store.exists(RUN_KEY)]
        return [(self.run, ""), *begun]

    def _pending_charts(self) -> list[tuple[RunFolder, str, str]]:
        found = []
        for run, prefix in self._folders():
            sent = {item.removeprefix(prefix) for item in self.cursor.items if item.startswith(prefix)}
            found += [
                (run, prefix, item) for item in pending_charts(run, run.identity().config, sent, is_branch=bool(prefix))
            ]
        return found

    def _draw(self, run: RunFolder, item: str) -> Evidence | None:
        try:
            return draw(run, run.identity().config, item)
        except StorageError:
            raise
        except Exception:  # a picture of a run must not end it, whatever it is that cannot be drawn
            logger.warning("%s of %s was not drawn", item, run.url, exc_info=True)
            return None

    def _describe(self) -> None:
        """Set the descriptions that have changed."""
        for run, prefix in self._folders():
            key = _key_of(prefix)
            text = describe_run(run, run.identity().config, {} if prefix else self.cursor.decisions)
            if self.cursor.notes.get(key) != text:
                self.tracker.set_tags(self._run_id(key), {NOTE_TAG: text[:LARGEST_TAG]})
                self.cursor.notes[key] = text

    def _forward_run(self, run: RunFolder, prefix: str) -> None:
        for key in self._pending_journals(run, prefix):
            segment = key.rsplit("/", 1)[-1].split("-")[0]
            child = _key_of(prefix) if prefix else f"segment/{int(segment)}"
            points = [
                Point(metric=name, value=value, step=row.tokens, time=row.time)
                for row in read_journal_object(run.store, key)
                for name, value in row.metrics.items()
            ]
            self.tracker.log_points(self._run_id(child), points)
            self.cursor.journals.append(prefix + key)
            self._save()
        # A version that is registered may make a decision pending.
        while items := self._pending_items(run, prefix):
            for item in items:
                self._forward_item(run, prefix, item)
                self.cursor.items.append(prefix + item)

    def _forward_item(self, run: RunFolder, prefix: str, item: str) -> None:
        kind, name = item.split("/", 1)
        if kind == "merged":
            manifest = run.all_merged()[name]  # A recovery may have left it behind just now.
            assert manifest.merge is not None
            self.tracker.log_text(
                self._run_id("merges"), json.dumps(dataclasses.asdict(manifest.merge), indent=1), f"lineage/{name}.json"
            )
            return
        if kind == registration.VERSION:
            self.registrar.register(name, self._run_id("merges"))
            return
        if kind == registration.DECISION:
            self.registrar.decide(name)
            return
        if item == datasets.ITEM:
            self.tracker.log_datasets(self._run_id(_key_of(prefix)), datasets.datasets_of(run, run.identity().config))
            return
        if kind == "note":
            self._forward_note(run, prefix, name)
            return
        if kind == "comparison":
            self._forward_comparison(run, prefix, name)
            return
        label, url_digest, tokens = name.split("@")
        evaluation = read_evaluation(run.store, url_digest, self.suite)
        assert evaluation is not None
        values = {f"evaluation/{label}_loss": evaluation.loss, f"evaluation/{label}_spread": evaluation.spread}
        points = [Point(metric=key, value=v, step=int(tokens), time=evaluation.created) for key, v in values.items()]
        self.tracker.log_points(self._run_id(_key_of(prefix) if prefix else "evaluations"), points)

    def _forward_note(self, run: RunFolder, prefix: str, name: str) -> None:
        """A spike, or what was done about it: a tag that reads as a sentence, and a point at its place on the token axis."""
        event = json.loads(run.store.read(f"events/{name}"))
        number = name.partition("-")[0]
        run_id = self._run_id(_key_of(prefix))
        self.tracker.set_tags(run_id, {f"pma.{event['kind']}.{number}": describe_event(event)[:LARGEST_TAG]})
        step = event.get("step") or event.get("start_step") or 0
        tokens = int(step) * self.config.training.batch_tokens
        metric = f"recovery/{event['kind'].replace('-', '_')}_count"
        self.tracker.log_points(run_id, [Point(metric=metric, value=1.0, step=tokens, time=float(event["time"]))])

    def _forward_comparison(self, run: RunFolder, prefix: str, name: str) -> None:
        """A comparison of arms: whole as an artifact, and its differences as metrics at the end of the run."""
        text = run.store.read(f"{COMPARISONS}/{name}").decode()
        comparison, run_id = json.loads(text), self._run_id(_key_of(prefix))
        self.tracker.log_text(run_id, text, "comparison.json")
        differences = comparison["over_seeds"] or comparison["seeds"][0]["differences"]
        tokens = self.config.training.total_tokens
        points = [
            Point(metric=f"comparison/{key}{suffix}", value=item[end], step=tokens, time=comparison["time"])
            for key, item in differences.items()
            for end, suffix in (("mean", ""), ("low", "_low"), ("high", "_high"))
            if item[end] is not None
        ]
        self.tracker.log_points(run_id, points)

    def _pending_journals(self, run: RunFolder, prefix: str) -> list[str]:
        sent = set(self.cursor.journals)
        return [key for key in journal_keys(run.store) if prefix + key not in sent]

    def _pending_items(self, run: RunFolder, prefix: str) -> list[str]:
        sent = set(self.cursor.items)
        items = [f"merged/{name}" for name in run.merged()]
        names = [key.rpartition("/")[2] for key in run.store.keys("events")]
        items += [f"note/{name}" for name in names if name.removesuffix(".json").partition("-")[2] in NOTED_EVENTS]
        items += [f"comparison/{key.rpartition('/')[2]}" for key in run.store.keys(COMPARISONS)]
        items.append(datasets.ITEM)
        evaluated = set(run.store.keys("evaluations"))
        checkpoints = [("raw", s.manifest) for s in run.snapshots()]
        checkpoints += [(_label(manifest), manifest) for manifest in run.merged().values()]
        items += [
            f"evaluation/{label}@{manifest.digest}@{manifest.tokens_seen}"
            for label, manifest in checkpoints
            # A merge of plain folders has no place on the token axis.
            if manifest.tokens_seen is not None and f"evaluations/{manifest.digest}-{self.suite}.json" in evaluated
        ]
        start = run.identity().start
        if start is not None and start.weights_only and f"evaluations/{start.digest}-{self.suite}.json" in evaluated:
            items.append(f"evaluation/raw@{start.digest}@0")
        if not prefix:
            items += registration.pending_items(run, self.config, sent, evaluated)
        return [item for item in items if prefix + item not in sent]

    def _run_id(self, key: str) -> str:
        if key not in self.cursor.runs:
            above = parent_of(key, self.cursor.runs)
            parent = None if above is None else self._run_id(above)
            tags = {"pma.run_url": self.run.url, "pma.run_id": self.run.identity().run_id, "pma.part": key}
            tags |= {"pma.kind": kind_of(key), **self._lineage_tags(key), **self._first_note(key)}
            params = identity_of(self.config) if key == "run" else {}
            name = name_of(key, self.config.name, self.run.url)
            self.cursor.runs[key] = self.tracker.start_run(name, parent_id=parent, tags=tags, params=params)
            if key == "run":
                text = json.dumps(config_to_dict(self.config), indent=1)
                self.tracker.log_text(self.cursor.runs[key], text, "config.json")
            self._save()
        return self.cursor.runs[key]

    def _first_note(self, key: str) -> dict[str, str]:
        """The description of a run that holds no training of its own, or of a segment."""
        if key.startswith("segment/"):
            text = describe_segment(self.run, int(key.removeprefix("segment/")))
        else:
            text = PARTS.get(kind_of(key), "")
        return {NOTE_TAG: text} if text else {}

    def _lineage_tags(self, key: str) -> dict[str, str]:
        """Whose weights the run, or branch, of this key began with."""
        if key != "run" and not key.startswith("branches/"):
            return {}
        run = self.run if key == "run" else self.run.branch(key.removeprefix("branches/"))
        start = run.identity().start
        return {"pma.init_url": start.url, "pma.init_digest": start.digest} if start and start.weights_only else {}

    def _count(self) -> int:
        return len(self.cursor.journals) + len(self.cursor.items)

    def _save(self) -> None:
        self._all_cursors[self.tracker.uri] = dataclasses.asdict(self.cursor)
        self.run.store.put(CURSOR_KEY, json.dumps(self._all_cursors).encode())


class TrackingThread:
    """Forwards beside the run; an MLflow that is away costs one warning."""

    def __init__(self, run: RunFolder, config: Config) -> None:
        self.forwarder = open_forwarder(run, config)
        self._stop = threading.Event()
        self._warned = False
        self._completed = False
        self._thread = threading.Thread(target=self._loop, daemon=True, name="tracking")

    def __enter__(self) -> TrackingThread:
        if self.forwarder is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    def finish(self, deadline_seconds: float = FINAL_WAIT_SECONDS) -> None:
        """Send the rest, waiting no longer than ``deadline_seconds``; the rest of the rest waits in the run folder."""
        if self.forwarder is None:
            return
        self._completed = True
        self._stop.set()
        self._thread.join(deadline_seconds)
        # Only once the thread is done: its turns and ours would send the same things twice.
        if not self._thread.is_alive():
            with contextlib.suppress(TrackingAway, StorageError):  # what is left is counted below
                self.forwarder.forward_charts()
        if self._thread.is_alive() or self.forwarder.lag():
            logger.warning(
                "MLflow is behind; `pma status --run %s` sends the rest once it answers", self.forwarder.run.url
            )

    def _loop(self) -> None:
        assert self.forwarder is not None
        while not self._stop.wait(POLL_SECONDS):
            self._try()
        self._try()

    def _try(self) -> None:
        assert self.forwarder is not None
        try:
            self.forwarder.forward()
            if self._completed:
                self.forwarder.finish("FINISHED")
            self._warned = False
        except (TrackingAway, StorageError) as error:
            if not self._warned:
                logger.warning("%s. The run goes on; metrics wait in its journal", error)
            self._warned = True


def open_forwarder(run: RunFolder, config: Config) -> Forwarder | None:
    """Forwarder to the configured server, or to a sqlite database in a local run folder; else None."""
    uri, location = config.tracking.uri, None
    if uri is None:
        if scheme_of(run.url) != "file":
            logger.warning("tracking.uri is not set and %s is not local: metrics stay in the run's journal", run.url)
            return None
        uri = f"sqlite:///{run.url}/mlflow.db"
    if uri.startswith(SQLITE):
        # MLflow's own default is a folder of wherever the command was typed.
        location = f"file://{Path(uri.removeprefix(SQLITE)).absolute().parent}/mlflow-artifacts"
    return Forwarder(run, config, Tracker(uri, config.tracking.experiment, location))


def bring_up_to_date(run: RunFolder, config: Config) -> dict[str, Any]:
    """Forward what is pending, for commands that look after a run; reports the lag that remains."""
    forwarder = open_forwarder(run, config)
    if forwarder is None:
        return {"uri": None, "lag": 0, "error": None, "promotions": []}
    error = None
    started = time.monotonic()
    if forwarder.lag():
        try:
            forwarder.forward()
            forwarder.forward_charts()
        except TrackingAway as away:
            error = str(away)
    return {
        "uri": forwarder.tracker.uri,
        "lag": forwarder.lag(),
        "error": error,
        "promotions": list(forwarder.cursor.decisions.values()),
        "seconds": time.monotonic() - started,
    }


def _label(manifest: Manifest) -> str:
    assert manifest.merge is not None
    return f"{manifest.merge.method}_n{len(manifest.merge.inputs)}"


def _key_of(prefix: str) -> str:
    """Our key of the MLflow run that the folder whose items begin with ``prefix`` is."""
    return prefix.rstrip("/") or "run"
