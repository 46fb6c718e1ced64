"""Make a merged checkpoint again from its MLflow record alone, and prove that it is the same."""

from __future__ import annotations

import os
import re
import time
from typing import Any
from urllib.parse import urlsplit

from cluster.model_registry import ModelRegistry, Version
from cluster.storage import open_store
from configs.errors import UserError
from configs.urls import require_no_credentials
from pipelines.ablate import take_away
from pipelines.merge import carry_out, require_workers
from pipelines.tracked.registration import LINEAGE_ARTIFACT_TAG, LINEAGE_TAG
from tasks.checkpoints.manifest import Manifest
from tasks.merging.lineage import Lineage, parse_lineage, plan_again
from tasks.merging.merge import MergeReport, find_standing, nothing_done

URI_VARIABLE = "MLFLOW_TRACKING_URI"


def rebuild(
    model: str, *, output: str | None = None, tracking_uri: str | None = None, workers: str = "local"
) -> dict[str, Any]:
    """Make the merged checkpoint that MLflow calls ``model`` (``NAME@ALIAS`` or ``NAME/VERSION``) again.

    It goes to ``output`` or, by default, to where it was published. Nothing but the MLflow record and the inputs that it
    names is read. A result whose digest is not the recorded one is taken away again, and ``ok`` is False. Returns the
    fields of ``pma rebuild --json``. Raises :class:`configs.errors.UserError` for a model, alias or version that is not
    there and for inputs that are gone or were replaced, :class:`cluster.tracking.TrackingAway` if MLflow does not answer.
    """
    started = time.perf_counter()
    require_workers(workers)
    registry = ModelRegistry(_require_server(tracking_uri))
    version = find_version(registry, model)
    lineage = read_lineage(registry, version)
    plan = plan_again(lineage, open_store(output or lineage.url).url, version.name)
    standing = find_standing(plan)
    report = carry_out(workers, [plan])[0] if standing is None else nothing_done(standing)
    ok = is_as_recorded(report.manifest, lineage)
    if not ok and report.is_new:
        take_away(plan.output_url)
    return {
        **_described(version, lineage, report),
        "output": plan.output_url,
        "ok": ok,
        "taken_away": not ok and report.is_new,
        "seconds": round(time.perf_counter() - started, 3),
    }


def find_version(registry: ModelRegistry, asked: str) -> Version:
    """The version that ``asked`` names; :class:`configs.errors.UserError` says what there is instead."""
    match = re.fullmatch(r"(?:models:/)?(?P<name>[^/@]+)(?:@(?P<alias>[\w-]+)|/(?P<number>\d+))", asked)
    if match is None:
        raise UserError(f"--model {asked!r}: expected NAME@ALIAS or NAME/VERSION, such as pmaflow-tiny@champion")
    name, number = match["name"], match["number"]
    aliases = registry.aliases(name)
    if aliases is None:
        raise UserError(f"--model {asked}: {registry.uri} has no registered model {name!r}")
    if match["alias"] is not None:
        if match["alias"] not in aliases:
            there = ", ".join(f"{alias} (version {at})" for alias, at in sorted(aliases.items())) or "none"
            raise UserError(f"--model {asked}: {name!r} has no alias {match['alias']!r}; it has {there}")
        number = aliases[match["alias"]]
    version = registry.version(name, number)
    if version is None:
        raise UserError(f"--model {asked}: {name!r} has no version {number}; its aliases: {aliases or 'none'}")
    return version


def read_lineage(registry: ModelRegistry, version: Version) -> Lineage:
    """What is on record of ``version``: its own tag, or an artifact of its run where that was too long for one."""
    text = version.tags.get(LINEAGE_TAG)
    if text is None and (path := version.tags.get(LINEAGE_ARTIFACT_TAG)) is not None:
        text = registry.read_text(version.run_id, path)
    if text is None:
        raise UserError(
            f"{version.name} has no tag {LINEAGE_TAG}: it was not registered by pmaflow, or by one that kept no such "
            "records yet; what it was made of is not known"
        )
    return parse_lineage(text, version.name)


def is_as_recorded(manifest: Manifest, lineage: Lineage) -> bool:
    """Whether weights and, where there is one, training state are those on record."""
    return (manifest.digest, manifest.state_digest) == (lineage.digest, lineage.state_digest)


def _described(version: Version, lineage: Lineage, report: MergeReport) -> dict[str, Any]:
    return {
        "model": version.model,
        "version": version.number,
        "run": version.run_id,
        "digest": report.manifest.digest,
        "expected_digest": lineage.digest,
        "state_digest": report.manifest.state_digest,
        "expected_state_digest": lineage.state_digest,
        "method": lineage.merge.method,
        "inputs": [{"url": item.url, "digest": item.digest, "step": item.step} for item in lineage.merge.inputs],
        "is_new": report.is_new,
        "bytes_read": report.bytes_read,
        "bytes_written": report.bytes_written,
    }


def _require_server(asked: str | None) -> str:
    uri = asked or os.environ.get(URI_VARIABLE)
    if not uri:
        raise UserError(
            f"give --tracking-uri, or set {URI_VARIABLE}; a local run without tracking.uri keeps its own at "
            "sqlite:///RUN/mlflow.db"
        )
    require_no_credentials(uri, "--tracking-uri")
    # MLflow would make an empty database of a mistyped path.
    path = urlsplit(uri).path[1:] if uri.startswith("sqlite:///") else None
    if path is not None and not os.path.isfile(path):  # noqa: PTH113  the path is MLflow's to read
        raise UserError(f"--tracking-uri {uri}: there is no file {path}")
    return uri
