"""Where the ranks of a gang tell one another how a snapshot's upload went: the gang's own key-value store.

Why the store that the process group was made with, and not a process group or objects in the run folder:

- A process group of its own would need every rank to arrive before any learns of a failure, and a full mesh of connections;
  and gloo ends the process when a peer goes away in the middle. Here the first failure is there for all to read at once.
- Receipts on object storage cannot tell that storage is down, which is the failure to be told; and they leave litter.

Nothing here is a collective: ranks come and go as they like, the training thread may use any process group meanwhile. The
board asks over a connection of its own and never blocks in the store. It is not durable and need not be: it lives as long
as the gang; what outlives the gang is the manifest alone.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import PrefixStore, Store

from configs.typed import parse_record
from tasks.checkpoints.manifest import Shard


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """What one rank has written."""

    shards: tuple[Shard, ...]
    """Its objects; none for a rank that owns no tensor."""
    upload_seconds: float
    """From the beginning of its upload to the end."""
    bytes: int
    """Of its objects."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a snapshot ended; every rank reads the same one."""

    is_committed: bool
    """Whether its manifest stands."""
    error: str = ""
    """Name of the type of what went wrong."""
    message: str = ""
    """Rank, place and cause, for people."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Of a committed one: ``snapshot/upload_seconds`` of the slowest rank and its kin."""


class SnapshotBoard:
    """Reports and outcomes of one gang's snapshots, which are numbered as they begin.

    Every method raises :class:`torch.distributed.DistError` if the store is gone, as it is when rank 0 is.
    """

    def __init__(self, store: Store, rank: int, world_size: int, segment: int = 0) -> None:
        """Snapshots are numbered anew in every ``segment``, which the same processes may make several of."""
        self.rank, self.world_size = rank, world_size
        self._store = PrefixStore(f"pma-snapshots/{segment}", store)

    def report(self, number: int, report: RankReport) -> None:
        """Say that this rank has written its share of snapshot ``number``."""
        self._store.set(_report_key(number, self.rank), json.dumps(dataclasses.asdict(report)))

    def reports(self, number: int) -> list[RankReport] | None:
        """Reports of all ranks in the order of ranks, or None while one is missing."""
        keys = [_report_key(number, rank) for rank in range(self.world_size)]
        if not self._store.check(keys):
            return None
        return [parse_record(RankReport, json.loads(self._store.get(key))) for key in keys]

    def missing(self, number: int) -> list[int]:
        """Ranks that have not reported."""
        return [rank for rank in range(self.world_size) if not self._store.check([_report_key(number, rank)])]

    def settle(self, number: int, outcome: Outcome) -> Outcome:
        """Say how snapshot ``number`` ended; the first word counts, and is returned."""
        stands = self._store.compare_set(_outcome_key(number), "", json.dumps(dataclasses.asdict(outcome)))
        return parse_record(Outcome, json.loads(stands))

    def outcome(self, number: int) -> Outcome | None:
        """How snapshot ``number`` ended, or None while that is open."""
        if not self._store.check([_outcome_key(number)]):
            return None
        return parse_record(Outcome, json.loads(self._store.get(_outcome_key(number))))

    def acknowledge(self, number: int) -> None:
        """Say that this rank has read the outcome."""
        self._store.add(_seen_key(number), 1)

    def is_read_by_all(self, number: int) -> bool:
        """Whether every rank has read the outcome of snapshot ``number``."""
        return self._store.add(_seen_key(number), 0) >= self.world_size

    def clear(self, number: int) -> None:
        """Forget snapshot ``number``; for rank 0, once every rank has read the outcome."""
        keys: Sequence[str] = [_report_key(number, rank) for rank in range(self.world_size)]
        for key in (*keys, _outcome_key(number), _seen_key(number)):
            self._store.delete_key(key)


def open_board(rank: int, world_size: int, segment: int = 0) -> SnapshotBoard:
    """The board of a ``segment`` of the gang whose default process group this process is in; not collective."""
    # There is no public way to the store that init_process_group made.
    store: Any = distributed_c10d._get_default_store()
    return SnapshotBoard(store.clone(), rank, world_size, segment)


def _report_key(number: int, rank: int) -> str:
    return f"{number}/report/{rank}"


def _outcome_key(number: int) -> str:
    return f"{number}/outcome"


def _seen_key(number: int) -> str:
    return f"{number}/seen"
