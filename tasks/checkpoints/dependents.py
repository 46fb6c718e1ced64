"""Runs elsewhere that begin with the weights of a checkpoint of this run: on record here, so that retention leaves it alone.

A branch lies below its run and is found there. A run at another URL is not: it puts an object below the run that its
checkpoint lies in, before it begins, while it holds a pin. The object stays, and with it the checkpoint, until somebody
removes it.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass

from cluster.errors import ObjectExists, StorageDenied
from cluster.storage import Store, open_store
from configs.errors import UserError
from configs.typed import parse_record
from tasks.checkpoints.digest import digest_bytes
from tasks.checkpoints.pins import checkpoint_name
from tasks.checkpoints.run_folder import RUN_KEY
from tasks.checkpoints.start_point import StartPoint

FOLDER = "dependents"
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Dependent:
    """A run that begins with a checkpoint of another."""

    run: str
    """URL of the run that depends."""
    checkpoint: str
    """Folder below the run that holds the checkpoint, as ``merged/...``."""
    digest: str
    """Its content digest."""


def register_dependent(start: StartPoint, run_url: str) -> None:
    """Put on record, where ``start`` lies in a run, that the run at ``run_url`` begins with it; once, however often called.

    A run that may only be read is left as it is, with a warning: its own retention does not know of ``run_url`` then.
    """
    place = checkpoint_name(open_store(start.url).url)
    if place is None or not (store := open_store(place[0])).exists(RUN_KEY):
        return
    dependent = Dependent(run=open_store(run_url).url, checkpoint=place[1], digest=start.digest)
    data = json.dumps(dataclasses.asdict(dependent), sort_keys=True).encode()
    try:
        store.create(f"{FOLDER}/{digest_bytes(data)[:16]}.json", data)
    except ObjectExists:
        pass
    except StorageDenied as error:
        logger.warning("%s: retention of %s will not know that %s begins with %s", error, store.url, run_url, place[1])


def read_dependents(store: Store) -> list[Dependent]:
    """What runs elsewhere begin with of the run at ``store``; a damaged record is an error, never no record."""
    return [_read(store, key) for key in store.keys(FOLDER) if key.endswith(".json")]


def reasons_of_dependents(dependents: Iterable[Dependent]) -> dict[str, list[str]]:
    """Checkpoints, by folder, that other runs begin with."""
    found: dict[str, list[str]] = {}
    for dependent in dependents:
        found.setdefault(dependent.checkpoint, []).append(f"start of {dependent.run}")
    return found


def _read(store: Store, key: str) -> Dependent:
    try:
        return parse_record(Dependent, json.loads(store.read(key)))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{store.url}/{key} is damaged ({error}): which checkpoint another run begins with is not known; remove the "
            "object once no run needs one"
        ) from error
