"""Forward what the run folder holds to MLflow: journal, merges, evaluations, registered versions.

The run folder is the truth and this is a copy: a cursor beside it says what was sent, so that an
MLflow that was away is brought up to date by any later command.

Tree in MLflow: the run; below it one child per segment, one for merges, one for evaluations and one per
branch.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from cluster.errors import StorageError
from cluster.journal import journal_keys, read_journal_object
from cluster.storage import scheme_of
from cluster.tracking import Point, Tracker, TrackingAway
from configs.load import config_to_dict, identity_of
from configs.schema import Config
from pipelines.wording import describe_event
from tasks.checkpoints.manifest import Manifest
from tasks.checkpoints.run_folder import RunFolder
from tasks.evaluation.held_out import read_evaluation, suite_of

CURSOR_KEY = "tracking/cursor.json"
COMPARISONS = "comparisons"
"""Folder of a run's comparisons of arms."""
ALIAS = "pma-latest"
NOTED_EVENTS = ("spike", "recovery", "recovered", "spike-unanswered")
"""Kinds of events that a tracked run is annotated with."""
LARGEST_TAG = 4000
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
    """Merges, evaluations, versions and artifacts sent."""


class Forwarder:
    """Sends what is new in a run and its branches to MLflow."""

    def __init__(self, run: RunFolder, config: Config, tracker: Tracker) -> None:
        self.run = run
        self.config = config
        self.tracker = tracker
        self.suite = suite_of(config)
        self._all_cursors: dict[str, Any] = json.loads(run.store.read_if_present(CURSOR_KEY) or b"{}")
        self.cursor = Cursor(**self._all_cursors.get(tracker.uri, {}))

    def forward(self) -> int:
        """Send everything that is pending; returns the number of items sent.

        Raises :class:`cluster.tracking.TrackingAway`; what was sent until then is remembered.
        """
        before = self._count()
        try:
            self._forward_run(self.run, prefix="")
            for name in self.run.branches():
                branch = self.run.branch(name)
                if branch.store.exists("run.json"):
                    self._forward_run(branch, prefix=f"branches/{name}/")
        finally:
            self._save()
        return self._count() - before

    def lag(self) -> int:
        """Items in the run folder that MLflow has not been sent."""
        folders = [(self.run, "")] + [(self.run.branch(name), f"branches/{name}/") for name in self.run.branches()]
        return sum(
            len(self._pending_journals(run, prefix)) + len(self._pending_items(run, prefix)) for run, prefix in folders
        )

    def finish(self, status: str) -> None:
        """Mark every run of the tree as ended."""
        for run_id in self.cursor.runs.values():
            self.tracker.end_run(run_id, status)

    def log_artifact(self, text: str, path: str) -> None:
        """Store an artifact in the top run."""
        self.tracker.log_text(self._run_id("run"), text, path)

    def register(self, url: str, manifest: Manifest) -> None:
        """Register a merged checkpoint by reference and move the alias, once per set of weights."""
        item = f"version/{manifest.digest}"
        if item in self.cursor.items or manifest.merge is None:
            return
        model = self.config.tracking.registered_model or f"pmaflow-{self.config.name}"
        run_id = self._run_id("merges")
        self.tracker.log_text(run_id, json.dumps({"url": url, "digest": manifest.digest}), "checkpoint/pointer.json")
        tags = {"digest": manifest.digest, "method": manifest.merge.method, "step": str(manifest.step)}
        self.tracker.register(model, url=url, run_id=run_id, alias=ALIAS, tags=tags)
        self.cursor.items.append(item)
        self._save()

    def _forward_run(self, run: RunFolder, prefix: str) -> None:
        for key in self._pending_journals(run, prefix):
            segment = key.rsplit("/", 1)[-1].split("-")[0]
            child = f"{prefix}segment/{int(segment)}" if not prefix else prefix.rstrip("/")
            points = [
                Point(metric=name, value=value, step=row.tokens, time=row.time)
                for row in read_journal_object(run.store, key)
                for name, value in row.metrics.items()
            ]
            self.tracker.log_points(self._run_id(child), points)
            self.cursor.journals.append(prefix + key)
            self._save()
        for item in self._pending_items(run, prefix):
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
        self.tracker.log_points(self._run_id("evaluations" if not prefix else prefix.rstrip("/")), points)

    def _forward_note(self, run: RunFolder, prefix: str, name: str) -> None:
        """A spike, or what was done about it: a tag that reads as a sentence, and a point at its place on the token axis."""
        event = json.loads(run.store.read(f"events/{name}"))
        number = name.partition("-")[0]
        run_id = self._run_id("run" if not prefix else prefix.rstrip("/"))
        self.tracker.set_tags(run_id, {f"pma.{event['kind']}.{number}": describe_event(event)[:LARGEST_TAG]})
        step = event.get("step") or event.get("start_step") or 0
        tokens = int(step) * self.config.training.batch_tokens
        metric = f"recovery/{event['kind'].replace('-', '_')}_count"
        self.tracker.log_points(run_id, [Point(metric=metric, value=1.0, step=tokens, time=float(event["time"]))])

    def _forward_comparison(self, run: RunFolder, prefix: str, name: str) -> None:
        """A comparison of arms: whole as an artifact, and its differences as metrics at the end of the run."""
        text = run.store.read(f"{COMPARISONS}/{name}").decode()
        comparison, run_id = json.loads(text), self._run_id("run" if not prefix else prefix.rstrip("/"))
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
        return [item for item in items if prefix + item not in sent]

    def _run_id(self, key: str) -> str:
        if key not in self.cursor.runs:
            parent = None if key == "run" else self._run_id("run")
            tags = {"pma.run_url": self.run.url, "pma.run_id": self.run.identity().run_id, "pma.part": key}
            tags |= self._lineage_tags(key)
            params = identity_of(self.config) if key == "run" else {}
            name = self.config.name if key == "run" else key.replace("/", " ").removeprefix("branches ")
            self.cursor.runs[key] = self.tracker.start_run(name, parent_id=parent, tags=tags, params=params)
            if key == "run":
                text = json.dumps(config_to_dict(self.config), indent=1)
                self.tracker.log_text(self.cursor.runs[key], text, "config.json")
            self._save()
        return self.cursor.runs[key]

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
        self._last_word: tuple[str, Manifest] | None = None
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
        if self._thread.is_alive() or self.forwarder.lag():
            logger.warning(
                "MLflow is behind; `pma status --run %s` sends the rest once it answers", self.forwarder.run.url
            )

    def register(self, url: str, manifest: Manifest) -> None:
        """Register a merged checkpoint once everything before it was sent."""
        self._last_word = (url, manifest)

    def _loop(self) -> None:
        assert self.forwarder is not None
        while not self._stop.wait(POLL_SECONDS):
            self._try()
        self._try()

    def _try(self) -> None:
        assert self.forwarder is not None
        try:
            self.forwarder.forward()
            if self._completed and self._last_word is not None:
                self.forwarder.register(*self._last_word)
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
        uri, location = f"sqlite:///{run.url}/mlflow.db", f"file://{run.url}/mlflow-artifacts"
    return Forwarder(run, config, Tracker(uri, config.tracking.experiment, location))


def bring_up_to_date(run: RunFolder, config: Config) -> dict[str, Any]:
    """Forward what is pending, for commands that look after a run; reports the lag that remains."""
    forwarder = open_forwarder(run, config)
    if forwarder is None:
        return {"uri": None, "lag": 0, "error": None}
    error = None
    started = time.monotonic()
    if forwarder.lag():
        try:
            forwarder.forward()
        except TrackingAway as away:
            error = str(away)
    return {"uri": forwarder.tracker.uri, "lag": forwarder.lag(), "error": error, "seconds": time.monotonic() - started}


def _label(manifest: Manifest) -> str:
    assert manifest.merge is not None
    return f"{manifest.merge.method}_n{len(manifest.merge.inputs)}"
