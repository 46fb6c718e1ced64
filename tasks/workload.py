"""The seam between the pipelines and what is trained: four functions, of a language model unless a run says otherwise.

Snapshots, resume, merges, schedules, recovery, evaluation records and reports know a network's tensors by name and
nothing else about it. What they have to ask is here. ``docs/workloads.md`` shows a whole workload in twenty lines.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, Self, cast

import numpy as np
from numpy.typing import NDArray

from cluster.storage import Store
from configs.errors import UserError
from configs.schema import Config
from tasks.data.skips import SkipRange, skip_to

if TYPE_CHECKING:
    import torch

Side = Literal["train", "held_out"]
FUNCTIONS = ("build", "batches", "loss", "evaluate")
WORKLOAD_KEY = "workload.json"
"""Lies in snapshots and merges of workloads that are no language models, and says which."""


class Rows(Protocol):
    """Some sequences of the run's stream, in its order."""

    def __len__(self) -> int:
        """Sequences."""
        ...

    def rows(self, start: int, end: int) -> Self:
        """Sequences ``start`` (included) to ``end`` (excluded), such as a micro-batch."""
        ...

    @property
    def weight(self) -> float | None:
        """What these count for in the loss of the global batch, summed over ranks; None where every sequence counts alike."""
        ...


class Batches(Protocol):
    """The endless stream of sequences of one side: what stands at a position never changes, whoever reads it."""

    @property
    def digest(self) -> str:
        """Identity of what is read; part of the training state."""
        ...

    def read(self, first_sequence: int, count: int, skips: Sequence[SkipRange] = ()) -> Rows:
        """The run's sequences ``first_sequence`` to ``first_sequence + count``; ``skips`` are jumped over. On a thread of its own."""
        ...

    def close(self) -> None:
        """Give up open files and threads."""
        ...


@dataclass(frozen=True, kw_only=True)
class ForwardPass:
    """Where in a step a forward pass is: one of its micro batches, on one rank."""

    config: Config
    """The run's."""
    step: int
    """Steps that were completed before this one."""
    micro_batches: int
    """Forward passes of this rank in the step."""
    world_size: int
    """Ranks."""
    weight: float | None
    """:attr:`Rows.weight` of the global batch, summed over ranks."""
    device: torch.device
    """Where the network is; batches are in host memory."""

    def mean(self, losses_B: torch.Tensor) -> torch.Tensor:
        """The share of this pass in the mean of all sequences of the global batch, from those of its own."""
        return losses_B.mean() / self.micro_batches


Slice = Mapping[str, tuple[float, int]]
"""Domain to the sum of its losses in one held-out slice and how many they are; the domain ``all`` where there is one."""
Measure = Callable[["torch.nn.Module"], Sequence[Slice]]
"""Measures a network (eval mode, no gradients) on ``evaluation.num_slices`` slices, the same for every network."""


class Workload(Protocol):
    """What a run trains. An instance is made for each process and holds nothing that training changes."""

    def build(self, config: Config) -> torch.nn.Module:
        """The network, its parameters float32 with one dimension or more, drawn from torch's global generator.

        That generator is seeded with ``config.seed`` before a run's first step. Parameters that a loss leaves without
        gradient are not moved. Raises :class:`configs.errors.UserError` for options that it does not know.
        """
        ...

    def batches(self, config: Config, side: Side) -> Batches:
        """The stream of one side; raises :class:`configs.errors.UserError` for data that is missing or too little."""
        ...

    def loss(self, network: torch.nn.Module, batch: Rows, this: ForwardPass) -> torch.Tensor:
        """A float32 scalar with gradient: summed over micro batches and averaged over ranks, the loss of the global batch.

        Where sequences count alike this is ``this.mean(losses)`` of float32 ``[B]``. Call ``network`` itself: its
        parameters are sharded, and only whole inside its forward. Draws of torch's global generator depend on (seed,
        step, rank) alone.
        """
        ...

    def evaluate(self, config: Config) -> Measure:
        """Prepare the held-out measurement, once for many checkpoints; lower is better."""
        ...


class DrawnRows:
    """Batches whose sequences are computed from their positions: the rows of ``rows_at(positions [n])``, n in dimension 0.

    ``rows_at`` is pure and gives named arrays or tensors; ``digest`` names what it computes.
    """

    def __init__(self, rows_at: Callable[[NDArray[np.int64]], Mapping[str, torch.Tensor]], digest: str) -> None:
        self._rows_at, self.digest = rows_at, digest

    def read(self, first_sequence: int, count: int, skips: Sequence[SkipRange] = ()) -> NamedRows:
        """The rows at the positions that these sequences have in the stream."""
        return NamedRows(self._rows_at(skip_to(np.arange(first_sequence, first_sequence + count), skips)), count)

    def close(self) -> None:
        """Nothing is open."""


class NamedRows:
    """Tensors by name, a row each for every sequence; all sequences count alike."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], count: int) -> None:
        wrong = [f"{name} has shape {list(t.shape)}" for name, t in tensors.items() if t.shape[:1] != (count,)]
        if wrong:
            raise ValueError(f"a batch of {count} sequences needs tensors with {count} rows: {', '.join(wrong)}")
        self._tensors, self._count = dict(tensors), count

    weight: float | None = None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def rows(self, start: int, end: int) -> Self:
        """Rows ``start`` (included) to ``end`` (excluded) of every tensor."""
        end = min(end, self._count)
        return type(self)({name: tensor[start:end] for name, tensor in self._tensors.items()}, end - start)


def open_workload(config: Config) -> Workload:
    """The workload of ``config``: what ``workload.entry`` names, made if it is a class; else the language model.

    Imports the module, which must be installed or on ``PYTHONPATH``, of workers too. Raises
    :class:`configs.errors.UserError` naming the module, attribute or function that is not there.
    """
    entry = config.workload.entry
    if not entry:
        from tasks.language_model import LanguageModel

        return LanguageModel()
    module_name, _, name = entry.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"workload.entry={entry!r}: there is no module {error.name!r}; install it, or put its folder on PYTHONPATH "
            "(on a cluster, of every node)"
        ) from error
    if not hasattr(module, name):
        known = [key for key, value in vars(module).items() if all(hasattr(value, one) for one in FUNCTIONS)]
        hint = f"; workloads there: {', '.join(known)}" if known else ""
        raise UserError(
            f"workload.entry={entry!r}: {module_name} ({getattr(module, '__file__', 'built in')}) has no {name}{hint}"
        )
    found = getattr(module, name)
    workload = found() if isinstance(found, type) else found
    if missing := [one for one in FUNCTIONS if not callable(getattr(workload, one, None))]:
        raise UserError(
            f"workload.entry={entry!r} is no workload: it lacks {', '.join(missing)}; a workload has "
            f"{', '.join(FUNCTIONS)} (docs/workloads.md)"
        )
    return cast(Workload, workload)


def files_of(config: Config) -> dict[str, bytes]:
    """Small files that lie beside the weights in a snapshot: what a language model is loaded with, or which workload it is."""
    if config.workload.is_language_model:
        from tasks.language_model import model_files

        return model_files(config)
    values = {"entry": config.workload.entry, "options": config.workload.options}
    return {WORKLOAD_KEY: json.dumps(values, indent=1, sort_keys=True).encode()}


def stated_workload(store: Store) -> str | None:
    """``workload.entry`` of the checkpoint at ``store``, as it says itself; None for language models and unknown ones."""
    data = store.read_if_present(WORKLOAD_KEY)
    try:
        values = json.loads(data or b"null")
    except ValueError:
        return None
    return str(values.get("entry")) if isinstance(values, dict) else None


def require_language_model(config: Config, what: str) -> None:
    """Raise :class:`configs.errors.UserError` where ``what`` is asked of a run of another workload."""
    if not config.workload.is_language_model:
        raise UserError(f"{what} is for language models; {config.name} trains workload.entry={config.workload.entry!r}")
