"""Merged checkpoints as registered model versions: with the lineage to make them again, and promoted by rule.

What is to be registered is noted in the run folder first, so that an MLflow that is away forgets nothing. Every turn may be
repeated: a version is made once for a digest, and a decision is kept before it is carried out.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterable, MutableMapping
from typing import Any

from cluster.errors import ObjectExists
from cluster.journal import write_event
from cluster.model_registry import DIGEST_TAG, ModelRegistry, Version
from cluster.tracking import Tracker
from configs.schema import Config
from configs.sections import NEWEST_ALIAS
from tasks.checkpoints.manifest import Manifest
from tasks.checkpoints.run_folder import RunFolder
from tasks.evaluation.held_out import Evaluation, evaluation_key, read_evaluation, suite_of
from tasks.evaluation.promotion import Measured, Verdict, judge
from tasks.merging.lineage import Lineage, encode_lineage, lineage_of, parse_lineage

FOLDER = "registrations"
"""Of a run: what is to be registered, an object a digest."""
VERSION, DECISION = "version", "decision"
"""Kinds of items that tracking sends; after a slash comes the digest."""
LINEAGE_TAG = "pma.lineage"
LINEAGE_ARTIFACT_TAG = "pma.lineage_artifact"
"""Names an artifact of the version's run, where the lineage is too long for a tag."""
CREATED_TAG, SUITE_TAG, LOSS_TAG, SLICES_TAG = "pma.created", "pma.suite", "pma.held_out_loss", "pma.held_out_slices"
PROMOTION_TAG, RULE_TAG = "pma.promotion", "pma.promotion_rule"
LARGEST_TAG = 100_000
"""Characters of a version's tag that MLflow takes."""
PROMOTION_EVENT = "promotion"


def ask_registration(run: RunFolder, url: str, manifest: Manifest, shard_bytes: int) -> None:
    """Note that the merged checkpoint at ``url`` is to be registered; once is enough."""
    text = encode_lineage(lineage_of(url, manifest, shard_bytes))
    with contextlib.suppress(ObjectExists):
        run.store.create(f"{FOLDER}/{manifest.digest}.json", text.encode())


def asked_digests(keys: Iterable[str]) -> list[str]:
    """Digests that :data:`FOLDER` holds, from its keys."""
    return [key.rpartition("/")[2].removesuffix(".json") for key in keys]


def pending_items(run: RunFolder, config: Config, sent: set[str], evaluated: set[str]) -> list[str]:
    """Versions that are not registered yet, and decisions whose evaluation is there by now."""
    digests, suite = asked_digests(run.store.keys(FOLDER)), suite_of(config)
    items = [f"{VERSION}/{digest}" for digest in digests if f"{VERSION}/{digest}" not in sent]
    if config.tracking.champion_alias is not None:
        items += [
            f"{DECISION}/{digest}"
            for digest in digests
            if f"{DECISION}/{digest}" not in sent and evaluation_key(digest, suite) in evaluated
        ]
    return items


class Registrar:
    """Registers one run's merges with one MLflow server."""

    def __init__(
        self,
        run: RunFolder,
        config: Config,
        tracker: Tracker,
        decisions: MutableMapping[str, Any],
        save: Callable[[], None],
    ) -> None:
        """``decisions``, by digest, and ``save``, which makes them durable, are the caller's."""
        self.run, self.config, self.tracker = run, config, tracker
        self.registry = ModelRegistry(tracker.uri)
        self.model = config.tracking.registered_model or f"pmaflow-{config.name}"
        self._decisions, self._save = decisions, save

    def register(self, digest: str, run_id: str) -> None:
        """Make the version of the merge with this content, and let :data:`NEWEST_ALIAS` name the newest there is."""
        lineage = self._lineage(digest)
        version = self.registry.find(self.model, digest)
        if version is None:
            version = self.registry.create(
                self.model,
                url=lineage.url,
                run_id=run_id,
                tags=self._tags(lineage, run_id) | self._measured_tags(digest),
            )
            self.registry.describe_model(self.model, _describe_model(self.config))
        self.registry.describe(version, describe_version(version, lineage, self._evaluation(digest), None))
        holder = self.registry.holder(self.model, NEWEST_ALIAS)
        # Another run may have registered a newer one while this one's word was under way.
        if holder is None or float(holder.tags.get(CREATED_TAG, "0")) <= lineage.created:
            self.registry.set_alias(NEWEST_ALIAS, version)

    def decide(self, digest: str) -> None:
        """Judge the version against the champion and carry that out; a decision that was made stands."""
        version = self.registry.find(self.model, digest)
        alias = self.config.tracking.champion_alias
        if version is None or alias is None:
            return  # Somebody deleted it: there is nothing to promote.
        if digest not in self._decisions:
            self._decisions[digest] = self._judge(version, digest, alias)
            self._save()
        decision = self._decisions[digest]
        holder = self.registry.holder(self.model, alias)
        is_due = decision["moved"] and not decision["carried_out"]
        if is_due and (holder.number if holder else None) == decision["champion"]:
            self.registry.set_alias(alias, version)
        # From here on the alias is left as people or later versions have it.
        decision["carried_out"] = True
        self._save()
        told = f"{'moved' if decision['moved'] else 'kept'}: {decision['reason']}"
        tags = {PROMOTION_TAG: told, RULE_TAG: decision["rule"], **self._measured_tags(digest)}
        self.registry.set_tags(version, tags)
        self.registry.describe(
            version, describe_version(version, self._lineage(digest), self._evaluation(digest), told)
        )
        self._tell(decision)

    def _judge(self, version: Version, digest: str, alias: str) -> dict[str, Any]:
        holder, margin = self.registry.holder(self.model, alias), self.config.tracking.champion_margin_errors
        evaluation = self._evaluation(digest)
        assert evaluation is not None, "a decision is pending once the evaluation is there"
        new = Measured(name=version.name, suite=evaluation.suite, slices=evaluation.slices)
        if holder is not None and holder.number == version.number:
            # Given to it by hand before its loss was known.
            verdict = Verdict(is_moved=False, reason=f"{version.name} holds it already")
        else:
            verdict = judge(new, None if holder is None else measured_of(holder), margin)
        return {
            "model": self.model,
            "version": version.number,
            "alias": alias,
            "moved": verdict.is_moved,
            "carried_out": False,
            "champion": None if holder is None else holder.number,
            "loss": new.loss,
            "gain": verdict.gain,
            "gain_error": verdict.error,
            "rule": describe_rule(margin),
            "reason": verdict.reason,
            "digest": digest,
            "time": time.time(),
        }

    def _tell(self, decision: dict[str, Any]) -> None:
        """An event of the run, once."""
        keys = [key for key in self.run.store.keys("events") if key.endswith(f"-{PROMOTION_EVENT}.json")]
        told = [json.loads(self.run.store.read(key)) for key in keys]
        if (decision["digest"], self.tracker.uri) not in [(event["digest"], event["uri"]) for event in told]:
            details = {
                key: value for key, value in decision.items() if key not in ("time", "digest", "rule", "carried_out")
            }
            write_event(
                self.run.store,
                PROMOTION_EVENT,
                {**details, "rule": decision["rule"], "digest": decision["digest"], "uri": self.tracker.uri},
            )

    def _lineage(self, digest: str) -> Lineage:
        key = f"{FOLDER}/{digest}.json"
        return parse_lineage(self.run.store.read(key).decode(), f"{self.run.url}/{key}")

    def _evaluation(self, digest: str) -> Evaluation | None:
        return read_evaluation(self.run.store, digest, suite_of(self.config))

    def _tags(self, lineage: Lineage, run_id: str) -> dict[str, str]:
        merge, identity = lineage.merge, self.run.identity()
        text, tags = encode_lineage(lineage), {}
        if len(text) <= LARGEST_TAG:
            tags[LINEAGE_TAG] = text
        else:
            tags[LINEAGE_ARTIFACT_TAG] = f"lineage/{lineage.digest}.json"
            self.tracker.log_text(run_id, text, tags[LINEAGE_ARTIFACT_TAG])
        # Where a server refuses the URL as a source, the version points at this.
        self.tracker.log_text(
            run_id, json.dumps({"url": lineage.url, "digest": lineage.digest}), "checkpoint/pointer.json"
        )
        values = {
            DIGEST_TAG: lineage.digest,
            "method": merge.method,
            "step": lineage.step,
            "tokens_seen": lineage.tokens_seen,
            "count": lineage.count,
            "interval_tokens": lineage.interval_tokens,
            "alpha": merge.alpha,
            "weights": ", ".join(f"{weight:.6g}" for weight in merge.weights),
            "dtype": merge.dtypes.get("write"),
            "pma.run_url": self.run.url,
            "pma.run_id": identity.run_id,
            "pma.code_version": lineage.code_version,
            CREATED_TAG: repr(lineage.created),
        }
        return tags | {key: str(value)[:LARGEST_TAG] for key, value in values.items() if value is not None}

    def _measured_tags(self, digest: str) -> dict[str, str]:
        evaluation = self._evaluation(digest)
        if evaluation is None or not math.isfinite(evaluation.loss):
            return {}
        tags = {LOSS_TAG: repr(evaluation.loss), SUITE_TAG: evaluation.suite}
        slices = json.dumps(evaluation.slices)
        return tags | ({SLICES_TAG: slices} if len(slices) <= LARGEST_TAG else {})


def measured_of(version: Version) -> Measured:
    """What the tags of ``version`` say of its held-out loss."""
    try:
        slices = tuple(float(value) for value in json.loads(version.tags.get(SLICES_TAG, "[]")))
    except (ValueError, TypeError):
        slices = ()
    return Measured(name=version.name, suite=version.tags.get(SUITE_TAG), slices=slices)


def describe_rule(margin_errors: float) -> str:
    """The rule in one sentence."""
    return (
        f"held-out loss lower than the champion's on the same slices, by at least {margin_errors:g} standard error(s) of the "
        "paired difference; equal or unknown: kept"
    )


def describe_version(version: Version, lineage: Lineage, evaluation: Evaluation | None, promotion: str | None) -> str:
    """The description of a version: what it is worth, then where it came from and how to have it again."""
    merge = lineage.merge
    loss = "not measured yet" if evaluation is None else f"{evaluation.loss:.4f}"
    at = "" if lineage.step is None else f" at step {lineage.step:,}"
    inputs = [f"  - `{item.url}`" for item in merge.inputs[:20]]
    inputs += [f"  - ... and {lineage.count - 20} more"] if lineage.count > 20 else []
    return "\n".join(
        [
            f"**Held-out loss {loss}**: {merge.method.upper()} of {lineage.count} snapshots{at}.",
            "",
            *([f"- promotion: {promotion}"] if promotion else []),
            f"- checkpoint: `{lineage.url}`",
            f"- content digest: `{lineage.digest}`",
            f"- made again, bit for bit: `pma rebuild --model {version.name} --output URL`",
            "- inputs, oldest first:",
            *inputs,
        ]
    )


def _describe_model(config: Config) -> str:
    champion, margin = config.tracking.champion_alias, config.tracking.champion_margin_errors
    lines = [
        f"Merged checkpoints of runs of `{config.name}`, by reference: the tag `url` says where each lies.",
        "",
        f"- `@{NEWEST_ALIAS}` is the newest",
    ]
    lines += [f"- `@{champion}` moves by rule: {describe_rule(margin)}"] if champion else []
    return "\n".join(lines)
