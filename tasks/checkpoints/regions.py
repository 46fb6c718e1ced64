"""Where the elements of a tensor lie: one or more boxes in global coordinates, each in some object.

A safetensors file holds a tensor whole: one region. A sharded checkpoint (torch DCP) holds one region
per rank that saved a part.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from tasks.checkpoints.safetensors_header import CheckpointError, tensor_bytes

MANY_REGIONS = 16
MAX_COMPARISONS = 4_000_000
"""Of pairs of regions, some seconds: grids, which is what trainers write, need none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """A box of a tensor whose elements lie row-major in one object."""

    key: str
    """Object below the checkpoint's folder."""
    offset: int
    """First byte of the elements in the object, or of the archive that holds them."""
    start: tuple[int, ...]
    """Global coordinates of the first element."""
    shape: tuple[int, ...]
    """Extent."""
    archive_bytes: int = 0
    """0 for bare elements; else the length of the torch.save archive at ``offset``, in which they are found when read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlace:
    """A stored tensor: what it is, and the regions that tile it."""

    dtype: str
    """safetensors dtype, such as ``F32`` or ``BF16``."""
    shape: tuple[int, ...]
    """Global shape."""
    regions: tuple[Region, ...]
    """Boxes that hold every element exactly once."""
    digest: str = ""
    """BLAKE3 of the tensor's row-major bytes; empty where it is not known."""
    thickest: int = field(init=False, repr=False, compare=False)
    """Largest extent of a region along the outermost dimension: how far before a row may a region that meets it begin."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "thickest", max((r.shape[0] for r in self.regions if r.shape), default=0))

    @property
    def num_elements(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of all elements."""
        return tensor_bytes(self.dtype, self.shape)

    @property
    def is_whole(self) -> bool:
        """Whether one region of bare elements holds all of it."""
        return len(self.regions) == 1 and not self.regions[0].archive_bytes and self.regions[0].shape == self.shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """Contiguous elements of one region, and the box of the tensor that they fill."""

    region: Region
    """Where they lie."""
    first: int
    """First element, counted in the region's own row-major order."""
    start: tuple[int, ...]
    """Global coordinates of the box."""
    shape: tuple[int, ...]
    """Extent of the box."""


def flat_boxes(shape: Sequence[int], start: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Boxes ``(start, extent)`` that make up elements ``start`` to ``end`` of a row-major tensor, in order.

    Each box has fixed indices in the outer dimensions, a range in one, and all of the inner ones: at most
    two boxes a dimension. A scalar has one box without coordinates.
    """
    if not shape:
        if start < end:
            yield (), ()
        return
    inner = math.prod(shape[1:])
    while start < end:
        row, inside = divmod(start, inner)
        if inside == 0 and end - start >= inner:
            rows = (end - start) // inner
            yield (row, *(0 for _ in shape[1:])), (rows, *shape[1:])
            start += rows * inner
        else:
            stop = min(end, (row + 1) * inner)
            for box_start, extent in flat_boxes(shape[1:], inside, stop - row * inner):
                yield (row, *box_start), (1, *extent)
            start = stop


def transfers(place: TensorPlace, start: int, end: int) -> Iterator[Transfer]:
    """What to read from which region to have elements ``start`` to ``end`` of ``place``."""
    for box_start, extent in flat_boxes(place.shape, start, end):
        for region in _touching(place, box_start, extent):
            low = tuple(max(a, b) for a, b in zip(box_start, region.start, strict=True))
            high = tuple(
                min(a + n, b + m) for a, n, b, m in zip(box_start, extent, region.start, region.shape, strict=True)
            )
            if all(a < b for a, b in zip(low, high, strict=True)):
                first = 0
                for coordinate, origin, size in zip(low, region.start, region.shape, strict=True):
                    first = first * size + coordinate - origin
                yield Transfer(
                    region=region, first=first, start=low, shape=tuple(b - a for a, b in zip(low, high, strict=True))
                )


def require_tiling(place: TensorPlace, where: str) -> None:
    """Refuse regions that leave the tensor, overlap, or do not cover it: :class:`CheckpointError` names ``where`` and a region."""
    for region in place.regions:
        if not (len(region.start) == len(region.shape) == len(place.shape)) or any(
            a < 0 or n < 0 or a + n > size for a, n, size in zip(region.start, region.shape, place.shape, strict=True)
        ):
            raise CheckpointError(f"{where}: {_describe(region)} leaves the tensor's shape {list(place.shape)}")
    held = sum(math.prod(region.shape) for region in place.regions)
    if held != place.num_elements:
        what = "overlap" if held > place.num_elements else "leave gaps"
        raise CheckpointError(
            f"{where}: {len(place.regions)} regions hold {held} elements, the tensor has {place.num_elements}: they {what}"
        )
    filled = [region for region in place.regions if math.prod(region.shape)]
    if not _is_grid(filled) and (pair := _overlapping(filled, where)):
        raise CheckpointError(f"{where}: {_describe(pair[0])} overlaps {_describe(pair[1])}")


def ordered(regions: Iterable[Region]) -> tuple[Region, ...]:
    """``regions`` by their coordinates, as :func:`transfers` needs them, without empty ones."""
    return tuple(sorted((r for r in regions if math.prod(r.shape)), key=lambda region: region.start))


def _touching(place: TensorPlace, box_start: tuple[int, ...], extent: tuple[int, ...]) -> Iterable[Region]:
    """Regions that may meet a box: by bisection along the outermost dimension."""
    regions = place.regions
    if len(regions) < MANY_REGIONS or not box_start:
        return regions
    low = bisect.bisect_left(regions, box_start[0] - place.thickest + 1, key=_row)
    high = bisect.bisect_left(regions, box_start[0] + extent[0], key=_row)
    return regions[low:high]


def _row(region: Region) -> int:
    return region.start[0]


def _is_grid(regions: Sequence[Region]) -> bool:
    """Whether the regions are every cell of a grid once: then they tile what they cover, whatever their number."""
    if not regions or not regions[0].shape:
        return len(regions) == 1
    edges: list[dict[int, int]] = [{} for _ in regions[0].shape]
    for region in regions:
        for dimension, (start, size) in enumerate(zip(region.start, region.shape, strict=True)):
            if edges[dimension].setdefault(start, size) != size:
                return False
    cells = math.prod(len(starts) for starts in edges)
    if not cells == len(regions) == len({region.start for region in regions}):
        return False
    return all(
        start + size <= following
        for starts in edges
        for (start, size), (following, _) in itertools.pairwise(sorted(starts.items()))
    )


def _overlapping(regions: Sequence[Region], where: str) -> tuple[Region, Region] | None:
    """Two regions that overlap: compared along the outermost dimension in order, so that most pairs are never looked at."""
    open_regions: list[Region] = []
    comparisons = 0
    for region in sorted(regions, key=lambda item: item.start):
        open_regions = [r for r in open_regions if not r.shape or r.start[0] + r.shape[0] > region.start[0]]
        comparisons += len(open_regions)
        if comparisons > MAX_COMPARISONS:
            raise CheckpointError(
                f"{where}: {len(regions)} regions are no grid, and too many to compare with each other"
            )
        for other in open_regions:
            if all(
                a < b + m and b < a + n
                for a, n, b, m in zip(region.start, region.shape, other.start, other.shape, strict=True)
            ):
                return other, region
        open_regions.append(region)
    return None


def _describe(region: Region) -> str:
    return f"region at {list(region.start)} of shape {list(region.shape)} in {region.key!r}"
