"""Fixed held-out slices: the same sequences for every checkpoint of every run on the same data."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from configs.schema import Config
from tasks.data.batch import Batch
from tasks.data.sequences import Stream


def held_out_batches(stream: Stream, config: Config) -> list[dict[str, Batch]]:
    """``evaluation.num_slices`` slices, disjoint: for each, the sequences of every domain by its name.

    A slice has ``evaluation.slice_tokens``; domains share it by their weights, each with at least one sequence.
    ``stream`` is of the held-out side. Raises :class:`configs.errors.UserError` if a domain is too short.
    """
    slices: list[dict[str, Batch]] = [{} for _ in range(config.evaluation.num_slices)]
    for number, (name, wanted) in enumerate(require_held_out(stream, config).items()):
        for chosen, places in zip(slices, slice_places(stream.windows[number], wanted, len(slices)), strict=True):
            chosen[name] = stream.read_batch(number, places)
    return slices


def require_held_out(stream: Stream, config: Config) -> Mapping[str, int]:
    """Sequences of each domain in a slice; :class:`configs.errors.UserError` if one has fewer than all slices need."""
    sequences = config.evaluation.slice_tokens // config.training.sequence_length
    weights = [Fraction(repr(float(domain.weight))) for domain in stream.domains]
    if sequences < len(weights):
        raise UserError(
            f"evaluation.slice_tokens={config.evaluation.slice_tokens} are {sequences} sequences, fewer than the "
            f"{len(weights)} domains of data.mixture; raise it"
        )
    shares = _apportion(sequences, weights)
    for domain, windows, share in zip(stream.domains, stream.windows, shares, strict=True):
        _require_windows(windows, share, config, "" if len(weights) == 1 else f" of the domain {domain.name!r}")
    return {domain.name: share for domain, share in zip(stream.domains, shares, strict=True)}


def slice_places(available: int, wanted: int, num_slices: int) -> list[NDArray[np.int64]]:
    """Windows ``[wanted]`` of each slice, of ``available`` ones.

    Places are spread evenly over the held-out side; from each, neighbouring windows go to the slices in turn:
    neighbours are of one file and alike in difficulty, so that the slices are matched.
    """
    places = (np.arange(wanted, dtype=np.int64) * (available // num_slices)) // wanted
    return [places * num_slices + number for number in range(num_slices)]


def _apportion(total: int, weights: list[Fraction]) -> list[int]:
    """``total`` in whole shares of ``weights``, each at least 1: largest remainders first, then by place."""
    spare, whole = total - len(weights), sum(weights, Fraction())
    exact = [spare * weight / whole for weight in weights]
    shares = [1 + int(value) for value in exact]
    by_remainder = sorted(range(len(weights)), key=lambda number: (int(exact[number]) - exact[number], number))
    for number in by_remainder[: total - sum(shares)]:
        shares[number] += 1
    return shares


def _require_windows(available: int, wanted: int, config: Config, of: str) -> None:
    length, slices = config.training.sequence_length, config.evaluation.num_slices
    if available < wanted * slices:
        raise UserError(
            f"evaluation.num_slices={slices} of evaluation.slice_tokens={config.evaluation.slice_tokens} need "
            f"{wanted * slices * length} held-out tokens{of}; there are {available * length}. "
            "Lower evaluation.slice_tokens or raise data.held_out_fraction"
        )
