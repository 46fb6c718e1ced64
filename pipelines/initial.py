"""The weights that a later stage begins with: found, held against the configuration, and on record, before any worker starts."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from cluster.errors import ObjectMissing
from cluster.storage import is_shared_with_workers, open_store
from configs.errors import UserError
from configs.schema import Config
from tasks.checkpoints.content import digest_of_weights
from tasks.checkpoints.dependents import register_dependent
from tasks.checkpoints.manifest import MANIFEST_KEY, read_manifest
from tasks.checkpoints.pins import hold_pins
from tasks.checkpoints.reader import Checkpoint, open_checkpoint
from tasks.checkpoints.run_folder import RUN_KEY, RunFolder, require_same_run
from tasks.checkpoints.safetensors_header import CheckpointError
from tasks.checkpoints.start_point import StartPoint, require_digest
from tasks.checkpoints.tied import without_tied

SHOWN = 20
"""Differences that a message lists."""
logger = logging.getLogger(__name__)


class InitialCheckpoint:
    """A checkpoint that arms begin with: opened, held against the configuration and hashed once, when that is first needed.

    Raises :class:`configs.errors.UserError` then, if there is none, or if it does not fit.
    """

    def __init__(self, option: str, url: str, config: Config) -> None:
        self.option, self.config = option, config
        self._store = open_store(url)

    @property
    def url(self) -> str:
        """Its folder."""
        return self._store.url

    @functools.cached_property
    def checkpoint(self) -> Checkpoint:
        """Its tensors, which fit the configuration."""
        if not is_shared_with_workers(self._store):
            raise UserError(f"{self.option} {self.url}: memory:// is seen by one process only; give a path or s3://")
        try:
            found = open_checkpoint(self.url)
        except (CheckpointError, UserError) as error:
            raise UserError(f"{self.option}: {error}") from error
        require_fit(self.option, self.config, found)
        return found

    @functools.cached_property
    def digest(self) -> str:
        """Its content digest; without a manifest to say it every weight is read."""
        if self.checkpoint.manifest is None:
            logger.warning("%s has no manifest: reading it once for its digest", self.url)
        try:
            return digest_of_weights(self.checkpoint)
        except (CheckpointError, ObjectMissing) as error:
            raise UserError(f"{self.option} {self.url}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class InitialWeights:
    """A run and the weights that it begins, or began, with."""

    run: RunFolder
    """The run."""
    config: Config
    """Its configuration."""
    start: StartPoint
    """The weights."""
    checkpoint: Checkpoint | None
    """The checkpoint that holds them; None for a run that is on record already."""


def find_initial_weights(source: InitialCheckpoint, run: RunFolder, config: Config) -> InitialWeights:
    """The weights of ``source`` for a run that begins with them; those on record, if the run was begun.

    Raises :class:`configs.errors.UserError` as ``source`` does, and if the run was begun with other weights or another
    configuration, with the difference.
    """
    if run.store.exists(RUN_KEY):
        start = _standing(source, run)
        require_same_run(run.identity(), config, start, run.url)
        return InitialWeights(run=run, config=config, start=start, checkpoint=None)
    start = StartPoint(url=source.url, digest=source.digest, step=0, tokens_seen=0, weights_only=True)
    return InitialWeights(run=run, config=config, start=start, checkpoint=source.checkpoint)


def begin_with(wanted: InitialWeights) -> None:
    """Put the run on record, if it is not.

    From then on retention of the run that the weights lie in leaves them alone (:mod:`tasks.checkpoints.dependents`).
    """
    with ExitStack() as stack:
        if wanted.checkpoint is not None:
            # Until the dependent is on record, which keeps its start from then on, a pin does.
            stack.enter_context(hold_pins([wanted.checkpoint]))
        register_dependent(wanted.start, wanted.run.url)
        wanted.run.begin(wanted.config, wanted.start)


def require_fit(option: str, config: Config, checkpoint: Checkpoint) -> None:
    """Raise :class:`configs.errors.UserError` listing how ``checkpoint`` differs from the network and vocabulary of ``config``."""
    from tasks.data.same_vocabulary import vocabulary_misfits
    from tasks.models.fit import misfits

    try:
        found = misfits(config, without_tied(checkpoint))
    except CheckpointError as error:
        raise UserError(f"{option} {checkpoint.url}: {error}") from error
    if found:
        raise UserError(
            f"{option} {checkpoint.url} does not fit the model section of {config.name}:\n{_listed(found)}\n"
            f"`pma config from-model {checkpoint.store.url}` prints the section of a folder with a config.json"
        )
    if config.workload.is_language_model and (found := vocabulary_misfits(config.data, checkpoint)):
        raise UserError(
            f"{option} {checkpoint.url} was trained on another vocabulary than the data of {config.name}:\n{_listed(found)}"
        )


def _standing(source: InitialCheckpoint, run: RunFolder) -> StartPoint:
    """The start of a run that was begun, if the weights of ``source`` are it."""
    start = run.identity().start
    if start is None or not start.weights_only:
        raise UserError(f"{run.url} is a run that did not begin with given weights; give another --run")
    if source.url == start.url:
        # Without a manifest they are proven by the gang that reads them; a run that has snapshots needs them no more.
        store = open_store(source.url)
        if store.exists(MANIFEST_KEY):
            require_digest(start, read_manifest(store)[0].digest)
        return start
    if source.digest != start.digest:
        raise UserError(
            f"{run.url} began with the weights of {start.url}, {source.option} {source.url} holds others: give the same, or "
            "another --run"
        )
    return start


def _listed(found: Sequence[str]) -> str:
    lines = [f"  {line}" for line in found[:SHOWN]]
    return "\n".join([*lines, *([f"  and {len(found) - SHOWN} more"] if len(found) > SHOWN else [])])
