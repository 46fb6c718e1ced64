"""The data of a run as MLflow datasets: named, with digests, never read whole.

A digest comes from what the project knows without reading: the manifest of token files, else a listing with sizes (and
ETags, where storage has them). It is found once, when a run is first tracked, and kept in the run folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cluster.data_files import list_data_files
from cluster.errors import StorageError
from cluster.storage import scheme_of
from cluster.tracking import TrackedDataset
from configs.data import DEFAULT_SOURCES, SIGNATURES_SOURCE, STDLIB_SOURCE, WHOLE
from configs.errors import UserError
from configs.schema import Config
from pipelines.adopt import ADOPTED_NOTE
from tasks.checkpoints.digest import fingerprint
from tasks.checkpoints.manifest import STATE_KEY
from tasks.checkpoints.run_folder import RunFolder
from tasks.data.domains import sources_key
from tasks.data.package_files import is_python_source
from tasks.data.sources import find_sources
from tasks.data.token_files import find_token_files
from tasks.evaluation.held_out import suite_of

RECORD_KEY = "tracking/datasets.json"
ITEM = "datasets/inputs"


@dataclass(frozen=True, kw_only=True)
class SourceFacts:
    """What is known of a domain's sources without reading them."""

    name: str
    """The domain."""
    weight: float
    """Its share."""
    sources: tuple[str, ...]
    """URLs as the user wrote them."""
    digest: str
    """Of manifests of token files, or of a listing."""
    by: str
    """Which of the two, or why neither."""
    num_files: int | None = None
    """Files."""
    num_bytes: int | None = None
    """Their size."""
    num_tokens: int | None = None
    """Tokens, where a manifest counts them."""


def datasets_of(run: RunFolder, config: Config) -> list[TrackedDataset]:
    """A dataset for each domain that ``run`` trains on, and one of what it is measured on.

    Empty for an adopted run, whose data nobody knows here.
    """
    if config.notes == ADOPTED_NOTE and config.data.sources == DEFAULT_SOURCES:
        return []
    facts, content = read_facts(run, config), _content_digest(run)
    training = [
        TrackedDataset(
            name=item["name"] if item["name"] != WHOLE else config.name,
            digest=item["digest"],
            source=json.dumps({"sources": item["sources"]}),
            context="training",
            profile=json.dumps(
                {key: value for key, value in item.items() if key not in ("name", "sources")}
                | ({"content_digest": content} if content else {})
            ),
        )
        for item in facts
    ]
    suite = suite_of(config)
    held_out = TrackedDataset(
        name="held-out",
        digest=fingerprint([suite, [item["digest"] for item in facts]]),
        source=json.dumps({"sources": [source for item in facts for source in item["sources"]], "suite": suite}),
        context="evaluation",
        profile=json.dumps(
            {
                "suite": suite,
                "held_out_fraction": config.data.held_out_fraction,
                "num_slices": config.evaluation.num_slices,
                "slice_tokens": config.evaluation.slice_tokens,
            }
        ),
    )
    return [*training, held_out]


def read_facts(run: RunFolder, config: Config) -> list[dict[str, Any]]:
    """What ``run`` has on record of its sources; found out and kept if this is the first time."""
    data = run.store.read_if_present(RECORD_KEY)
    if data is None:
        data = json.dumps([asdict(item) for item in find_facts(config)]).encode()
        run.store.put(RECORD_KEY, data)
    return list(json.loads(data))


def find_facts(config: Config) -> list[SourceFacts]:
    """Facts of every domain of ``config``, by one listing of its sources each."""
    asked = [(d.name, d.sources, d.weight) for d in config.data.mixture] or [(WHOLE, config.data.sources, 1.0)]
    return [_facts_of(name, sources, weight, config) for name, sources, weight in asked]


def _facts_of(name: str, sources: Sequence[str], weight: float, config: Config) -> SourceFacts:
    known: dict[str, Any] = {"name": name, "weight": weight, "sources": tuple(sources)}
    try:
        # Rows from docstrings to signatures are made of the library's files.
        files = [STDLIB_SOURCE if source == SIGNATURES_SOURCE else source for source in sources]
        found = find_sources(files, config.data, sources_key(name))
        if found.tokens:
            return _of_token_files(known, found.tokens, config)
        rows = _listed(files, found.texts)
    except (UserError, StorageError, OSError) as error:
        # The run has its data, or it would not have begun; this process may have no way to it.
        digest = fingerprint({"sources": list(sources)})
        return SourceFacts(**known, digest=digest, by=f"names of the sources alone: {str(error)[:200]}")
    return SourceFacts(
        **known,
        digest=fingerprint(rows),
        by="listing of names, sizes and ETags",
        num_files=len(rows),
        num_bytes=sum(row[1] for row in rows),
    )


def _of_token_files(known: dict[str, Any], urls: Sequence[str], config: Config) -> SourceFacts:
    sets = [find_token_files(url, dtype=config.data.token_dtype) for url in urls]
    files = [file for item in sets for file in item.files]
    stated = [item.manifest.digest if item.manifest else None for item in sets]
    rows = [[file.url.rpartition("/")[2], file.tokens, file.dtype] for file in files]
    return SourceFacts(
        **known,
        digest=fingerprint([digest or rows for digest in stated]),
        by="manifests of token files" if all(stated) else "names and sizes of token files",
        num_files=len(files),
        num_tokens=sum(file.tokens for file in files),
    )


def _listed(sources: Sequence[str], texts: Sequence[tuple[str, str]]) -> list[list[Any]]:
    """Name below its source, size and, on object storage, version of every file; times of local files say nothing."""
    remote = {
        file.url: file
        for source in sources
        if not is_python_source(source) and scheme_of(source) != "file"
        for file in list_data_files(source)
    }
    rows: list[list[Any]] = []
    for relative, url in texts:
        file = remote.get(url)
        size = os.stat(url.removeprefix("file://")).st_size if file is None else file.bytes
        rows.append([relative, size, "" if file is None else file.version])
    return sorted(rows)


def _content_digest(run: RunFolder) -> str | None:
    """Digest of the training text itself, which workers computed when they read it: it is in every training state."""
    snapshots = run.glances()
    data = (
        run.store.read_if_present(f"{snapshots[0].url.removeprefix(run.url + '/')}/{STATE_KEY}") if snapshots else None
    )
    return None if data is None else json.loads(data).get("data_position", {}).get("corpus_digest")
