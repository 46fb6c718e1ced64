"""What sharded steps consist of: every snapshot, merge and evaluation that a run will have, and which of them are committed.

Enumerated from the configuration and committed manifests alone, so that two drivers, or one after a crash, list the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.storage import open_store
from pipelines.driven import Driven
from pipelines.steps import Unit
from tasks.checkpoints.catalog import Glance, Look
from tasks.checkpoints.dooms import merges_made
from tasks.checkpoints.manifest import Manifest, read_manifest
from tasks.checkpoints.run_folder import snapshot_key
from tasks.evaluation.held_out import evaluation_key, suite_of
from tasks.merging.schedule import due_merges, schedule_of
from tasks.training.schedule import phase_at

STATE_FACTOR = 3
"""A snapshot holds the weights and two moments of the optimizer, all in float32."""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """A snapshot that the run has or will have."""

    step: int
    """Completed optimizer steps."""
    tokens_seen: int
    """Tokens seen up to it."""
    phase: str | None
    """Phase of the schedule."""
    healthy: bool = True
    """What is not trained yet is taken to go well."""
    recovery: int = 0
    """Recoveries in force when it was or will be made."""
    ephemeral: bool = False
    """Whether it is there to resume from alone, and in no window."""
    committed: Glance | None = None
    """The snapshot, once it is there."""

    @property
    def name(self) -> str:
        """Folder below ``snapshots``."""
        return snapshot_key(self.step, self.recovery).rpartition("/")[2]


def expected_snapshots(driven: Driven, look: Look) -> list[Expected]:
    """Snapshots that ``look`` saw, and those that training to the end will add, by step."""
    config, start = driven.config, driven.start
    batch = config.training.batch_tokens
    interval, total = config.snapshots.interval_tokens // batch, config.training.total_steps
    begun = start.step if start else 0
    found = {
        s.step: Expected(
            step=s.step,
            tokens_seen=s.tokens_seen or 0,
            phase=s.phase,
            healthy=s.healthy,
            recovery=s.recovery,
            ephemeral=s.ephemeral,
            committed=s,
        )
        for s in look.snapshots()
        if s.step is not None
    }
    newest = max(found, default=begun)
    for step in {*range(interval, total + 1, interval), total}:
        if step > newest:
            found[step] = Expected(
                step=step,
                tokens_seen=step * batch,
                phase=phase_at(config, step * batch),
                recovery=len(look.recoveries),
            )
    return [found[step] for step in sorted(found)]


def snapshot_units(driven: Driven) -> list[Unit]:
    """The snapshots of the run."""
    look = driven.run.look()
    size = model_bytes(driven, look) * STATE_FACTOR
    return [
        Unit(name=item.name, is_done=item.committed is not None, bytes_written=size)
        for item in expected_snapshots(driven, look)
    ]


def merge_units(driven: Driven) -> list[Unit]:
    """The scheduled merges of the run."""
    look = driven.run.look()
    done, size = merges_made(driven.run.store, look.all_merged()), model_bytes(driven, look)
    return [
        Unit(name=merge.name, is_done=merge.name in done, bytes_read=len(merge.window) * size, bytes_written=size)
        for merge in due_merges(expected_snapshots(driven, look), schedule_of(driven.config), ())
    ]


def evaluation_units(driven: Driven, *, merges: bool = True) -> list[Unit]:
    """The evaluations of the run's snapshots, of weights that it begins with and, with ``merges``, of its scheduled merges."""
    look = driven.run.look()
    suite, size, merged = suite_of(driven.config), model_bytes(driven, look), look.merged()
    done = set(driven.run.store.keys("evaluations"))
    rows = [row for row in schedule_of(driven.config) if row.evaluate and merges]
    expected = expected_snapshots(driven, look)
    digests = {item.name: item.committed.digest if item.committed else None for item in expected}
    for merge in due_merges(expected, rows, ()):
        digests[merge.name] = merged[merge.name].digest if merge.name in merged else None
    if driven.start is not None and driven.start.weights_only:
        digests["init"] = driven.start.digest
    return [
        Unit(name=name, is_done=digest is not None and evaluation_key(digest, suite) in done, bytes_read=size)
        for name, digest in digests.items()
    ]


def model_bytes(driven: Driven, look: Look) -> int:
    """Bytes of the weights of one checkpoint: of the newest snapshot or, before there is one, of the configured model."""
    snapshots = look.snapshots()
    if snapshots:
        return _model_part(read_manifest(open_store(snapshots[-1].url))[0])
    # Weights that a run begins with may be another trainer's, without a manifest.
    if driven.start is not None and driven.start.digest and not driven.start.weights_only:
        return _model_part(read_manifest(open_store(driven.start.url))[0])
    from tasks.models.fit import empty_network

    return 4 * sum(parameter.numel() for parameter in empty_network(driven.config).parameters())


def _model_part(manifest: Manifest) -> int:
    return sum(shard.bytes for shard in manifest.shards if shard.part == "model")
