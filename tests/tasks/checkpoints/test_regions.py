"""Boxes and regions versus NumPy: any shape, any tiling, any flat range; and tilings that are none."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.checkpoints.regions import Region, TensorPlace, flat_boxes, ordered, require_tiling, transfers
from tasks.checkpoints.safetensors_header import CheckpointError

HYPOTHESIS = settings(max_examples=200, deadline=None, derandomize=True, database=None)
Box = tuple[tuple[int, ...], tuple[int, ...]]
SHAPES = st.lists(st.integers(1, 6), max_size=4).map(tuple)
SHAPES_OR_EMPTY = st.lists(st.integers(0, 5), max_size=4).map(tuple)


def box(start: Sequence[int], *extent: int, key: str = "x") -> Region:
    return Region(key=key, offset=0, start=tuple(start), shape=extent)


def place_of(shape: tuple[int, ...], regions: Sequence[Region]) -> TensorPlace:
    return TensorPlace(dtype="F32", shape=shape, regions=tuple(regions))


def numbered(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(math.prod(shape)).reshape(shape)


def window(start: Sequence[int], extent: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(a, a + n) for a, n in zip(start, extent, strict=True))


@st.composite
def flat_ranges(draw: st.DrawFn, size: int) -> tuple[int, int]:
    start = draw(st.integers(0, size))
    return start, draw(st.integers(start, size))


@st.composite
def grids(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Box]:
    """Every cell of a random grid."""
    cuts = [sorted(draw(st.sets(st.integers(1, size - 1), max_size=3))) if size > 1 else [] for size in shape]
    spans = [
        [(a, b - a) for a, b in itertools.pairwise([0, *cut, size])] for cut, size in zip(cuts, shape, strict=True)
    ]
    return [(tuple(a for a, _ in cell), tuple(n for _, n in cell)) for cell in itertools.product(*spans)]


@st.composite
def cut_up(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Box]:
    """Boxes cut in two again and again: they tile, and are seldom a grid."""
    boxes: list[Box] = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 24))):
        start, extent = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dimensions = [d for d, size in enumerate(extent) if size > 1]
        if not dimensions:
            boxes.append((start, extent))
            continue
        d = draw(st.sampled_from(dimensions))
        size = draw(st.integers(1, extent[d] - 1))
        boxes.append((start, (*extent[:d], size, *extent[d + 1 :])))
        boxes.append(
            ((*start[:d], start[d] + size, *start[d + 1 :]), (*extent[:d], extent[d] - size, *extent[d + 1 :]))
        )
    return boxes


@st.composite
def tiled(draw: st.DrawFn, *, largest: int = 6) -> TensorPlace:
    """A tensor and regions that tile it, in random order before they are ordered."""
    shape = draw(st.lists(st.integers(1, largest), max_size=4).map(tuple))
    boxes = draw(st.permutations(draw(st.one_of(grids(shape), cut_up(shape)))))
    return place_of(shape, ordered(box(start, *extent, key=str(n)) for n, (start, extent) in enumerate(boxes)))


# Flat ranges as boxes


@HYPOTHESIS
@given(st.data())
def test_flat_boxes_of_any_range_are_its_elements_in_order(data: st.DataObject) -> None:
    shape = data.draw(SHAPES_OR_EMPTY)
    start, end = data.draw(flat_ranges(math.prod(shape)))
    boxes = list(flat_boxes(shape, start, end))
    elements = [numbered(shape)[window(*item)].reshape(-1) for item in boxes]
    assert np.concatenate([np.arange(0), *elements]).tolist() == list(range(start, end))
    assert len(boxes) <= 2 * max(1, len(shape))


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (4, 3, 2), (2, 3, 2, 2)])
def test_flat_boxes_of_every_range_are_its_elements_in_order(shape: tuple[int, ...]) -> None:
    whole = numbered(shape)
    for start, end in itertools.combinations_with_replacement(range(whole.size + 1), 2):
        elements = [whole[window(*item)].reshape(-1) for item in flat_boxes(shape, start, end)]
        assert np.concatenate([np.arange(0), *elements]).tolist() == list(range(start, end))


def test_flat_boxes_of_a_whole_tensor_is_one_box() -> None:
    assert list(flat_boxes((3, 4, 5), 0, 60)) == [((0, 0, 0), (3, 4, 5))]


def test_flat_boxes_of_a_scalar_has_no_coordinates() -> None:
    assert list(flat_boxes((), 0, 1)) == [((), ())]
    assert list(flat_boxes((), 0, 0)) == []


def test_flat_boxes_of_terabytes_need_no_more_boxes_than_dimensions_ask() -> None:
    shape = (1 << 20, 1 << 15, 1 << 10)
    boxes = list(flat_boxes(shape, 12345, math.prod(shape) - 54321))
    assert len(boxes) <= 6
    assert sum(math.prod(extent) for _, extent in boxes) == math.prod(shape) - 54321 - 12345


# Flat ranges in regions


def require_transfers_right(place: TensorPlace, start: int, end: int) -> None:
    """What the transfers bring is NumPy's slice: each element once, contiguous in the region it comes from."""
    whole = numbered(place.shape)
    found = np.full(place.shape, -1)
    for item in transfers(place, start, end):
        stored = whole[window(item.region.start, item.region.shape)].reshape(-1)
        size = math.prod(item.shape)
        assert size > 0
        assert item.first + size <= stored.size
        target = window(item.start, item.shape)
        assert (found[target] == -1).all()
        found[target] = stored[item.first : item.first + size].reshape(item.shape)
    expected = np.where((whole >= start) & (whole < end), whole, -1)
    assert np.array_equal(found, expected)


@HYPOTHESIS
@given(st.data())
def test_transfers_of_any_range_in_any_tiling_bring_its_elements_once(data: st.DataObject) -> None:
    place = data.draw(tiled())
    require_tiling(place, "here")
    require_transfers_right(place, *data.draw(flat_ranges(place.num_elements)))


@HYPOTHESIS
@given(st.data())
def test_transfers_among_many_unequal_regions_bring_every_element_once(data: st.DataObject) -> None:
    # From 16 regions on, only those near the box are looked at: some are thick, some thin.
    shape = (data.draw(st.integers(20, 40)), data.draw(st.integers(1, 3)))
    cuts = sorted(data.draw(st.sets(st.integers(1, shape[0] - 1), min_size=16, max_size=19)))
    boxes = [((a, 0), (b - a, shape[1])) for a, b in itertools.pairwise([0, *cuts, shape[0]])]
    place = place_of(shape, ordered(box(start, *extent) for start, extent in boxes))
    require_tiling(place, "here")
    require_transfers_right(place, *data.draw(flat_ranges(place.num_elements)))


@pytest.mark.parametrize("thick_first", [True, False])
def test_transfers_beside_one_thick_region_find_it(thick_first: bool) -> None:
    # Column 0 is one region of 32 rows, column 1 has a region a row.
    thick, thin = (0, 1) if thick_first else (1, 0)
    regions = [box((0, thick), 32, 1), *(box((row, thin), 1, 1) for row in range(32))]
    place = place_of((32, 2), ordered(regions))
    require_tiling(place, "here")
    for start in range(0, 64, 3):
        require_transfers_right(place, start, min(64, start + 7))


def test_transfers_of_a_scalar_bring_it() -> None:
    place = place_of((), [box(())])
    require_tiling(place, "here")
    assert [(item.first, item.start, item.shape) for item in transfers(place, 0, 1)] == [(0, (), ())]


@HYPOTHESIS
@given(st.data())
def test_transfers_of_an_empty_range_are_none(data: st.DataObject) -> None:
    place = data.draw(tiled())
    position = data.draw(st.integers(0, place.num_elements))
    assert list(transfers(place, position, position)) == []


# What tiles, and what does not


@HYPOTHESIS
@given(tiled())
def test_require_tiling_of_any_tiling_accepts(place: TensorPlace) -> None:
    require_tiling(place, "here")


@HYPOTHESIS
@given(st.data())
def test_require_tiling_of_random_boxes_agrees_with_counting(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple))
    boxes = data.draw(st.one_of(grids(shape), cut_up(shape)))
    for _ in range(data.draw(st.integers(0, 2))):
        moved = data.draw(st.integers(0, len(boxes) - 1))
        _, extent = boxes[moved]
        boxes[moved] = (
            tuple(data.draw(st.integers(0, size - n)) for size, n in zip(shape, extent, strict=True)),
            extent,
        )
    counts = np.zeros(shape, int)
    for item in boxes:
        counts[window(*item)] += 1
    place = place_of(shape, ordered(box(start, *extent) for start, extent in boxes))
    if (counts == 1).all():
        require_tiling(place, "here")
    else:
        with pytest.raises(CheckpointError, match=r"^here: .*(overlap|leave gaps)"):
            require_tiling(place, "here")


@HYPOTHESIS
@given(st.data())
def test_require_tiling_without_one_region_refused_as_gap(data: st.DataObject) -> None:
    place = data.draw(tiled())
    lost = data.draw(st.integers(0, len(place.regions) - 1))
    rest = place.regions[:lost] + place.regions[lost + 1 :]
    with pytest.raises(CheckpointError, match=rf"^here: {len(rest)} regions hold .*: they leave gaps$"):
        require_tiling(place_of(place.shape, rest), "here")


@HYPOTHESIS
@given(st.data())
def test_require_tiling_with_one_region_twice_refused_as_overlap(data: st.DataObject) -> None:
    place = data.draw(tiled())
    twice = data.draw(st.sampled_from(place.regions))
    with pytest.raises(CheckpointError, match="they overlap"):
        require_tiling(place_of(place.shape, ordered([*place.regions, twice])), "here")


def test_require_tiling_overlap_that_hides_a_gap_names_both_regions() -> None:
    # 12 elements in all, as many as the tensor has: row 1 twice, row 3 never.
    regions = [box((0, 0), 2, 3, key="first"), box((1, 0), 2, 3, key="second")]
    with pytest.raises(
        CheckpointError,
        match=r"^here: region at \[0, 0\] of shape \[2, 3\] in 'first' overlaps region at \[1, 0\] of shape \[2, 3\] in 'second'$",
    ):
        require_tiling(place_of((4, 3), regions), "here")


@pytest.mark.parametrize("columns", [(2, 0), (0, 2), (1, 1)])
def test_require_tiling_overlap_beside_each_other_refused_from_either_side(columns: tuple[int, int]) -> None:
    # 15 elements, as many as the tensor has; the later region begins in a column before or after that of the other.
    regions = [box((0, columns[0]), 2, 3), box((1, columns[1]), 2, 3), box((2, 4), 1, 1), box((0, 0), 1, 2)]
    with pytest.raises(CheckpointError, match="overlaps"):
        require_tiling(place_of((3, 5), ordered(regions)), "here")


def test_require_tiling_same_region_twice_for_another_refused() -> None:
    regions = [box((0, 0), 2, 3), box((0, 0), 2, 3)]
    with pytest.raises(CheckpointError, match="overlaps"):
        require_tiling(place_of((4, 3), regions), "here")


def test_require_tiling_grid_whose_cells_overlap_refused() -> None:
    # Every start of a 2 x 2 grid once and sizes that agree by row and column, yet columns 1 and 2 overlap.
    regions = [box((row, column), 1, 2) for row in (0, 1) for column in (0, 1)]
    with pytest.raises(CheckpointError, match="overlaps"):
        require_tiling(place_of((2, 4), regions), "here")


@pytest.mark.parametrize(
    ("start", "extent"),
    [((0, 0), (3, 3)), ((1, 1), (1, 3)), ((2, 0), (1, 3)), ((0, -1), (2, 3)), ((0, 0), (2, -3)), ((0,), (6,)), ((0, 0, 0), (2, 3, 1))],
)  # fmt: skip
def test_require_tiling_region_outside_the_shape_refused_by_name(
    start: tuple[int, ...], extent: tuple[int, ...]
) -> None:
    with pytest.raises(CheckpointError, match=r"^here: region at .* in 'far' leaves the tensor's shape \[2, 3\]$"):
        require_tiling(place_of((2, 3), [box(start, *extent, key="far")]), "here")


@pytest.mark.parametrize(("start", "extent"), [((0,), (2, 3)), ((0, 0, 0), (2, 3)), ((), (2, 3))])
def test_require_tiling_start_of_another_length_refused_by_name(
    start: tuple[int, ...], extent: tuple[int, ...]
) -> None:
    with pytest.raises(CheckpointError, match=r"^here: region at .* in 'far' leaves the tensor's shape \[2, 3\]$"):
        require_tiling(place_of((2, 3), [box(start, *extent, key="far")]), "here")


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4, 2)])
def test_require_tiling_empty_tensor_needs_no_region(shape: tuple[int, ...]) -> None:
    require_tiling(place_of(shape, []), "here")
    require_tiling(place_of(shape, [box((0,) * len(shape), *shape)]), "here")


def test_require_tiling_scalar_without_region_refused() -> None:
    with pytest.raises(CheckpointError, match="leave gaps"):
        require_tiling(place_of((), []), "here")


def test_require_tiling_sizes_beyond_64_bits_refused() -> None:
    with pytest.raises(CheckpointError, match="leave gaps"):
        require_tiling(place_of((2**62, 2**62), [box((0, 0), 2**62, 1)]), "here")


def test_ordered_sorts_and_drops_empty_regions() -> None:
    regions = ordered([box((2, 0), 1, 3), box((3, 0), 0, 3), box((0, 0), 2, 3)])
    assert [region.start for region in regions] == [(0, 0), (2, 0)]


# Thousands of ranks


def checkerboard(rows: int, columns: int) -> TensorPlace:
    regions = [box((2 * row, 3 * column), 2, 3) for row in range(rows) for column in range(columns)]
    return place_of((2 * rows, 3 * columns), ordered(regions[::-1]))


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("rows", "columns"), [(20_000, 1), (1, 20_000), (150, 150)])
def test_require_tiling_of_thousands_of_regions_is_no_square(rows: int, columns: int) -> None:
    # 20,000 regions by pairs would be 200 million comparisons, some minutes.
    require_tiling(checkerboard(rows, columns), "here")


@pytest.mark.timeout(60)
def test_require_tiling_of_thousands_of_uneven_rows_with_one_overlap_names_it() -> None:
    regions = [box((row, 0), 1, 3) for row in range(20_000) if row != 777]
    regions.append(box((12_344, 0), 1, 3, key="double"))
    with pytest.raises(CheckpointError, match=r"region at \[12344, 0\] .*overlaps .*region at \[12344, 0\]"):
        require_tiling(place_of((20_000, 3), ordered(regions)), "here")


@pytest.mark.timeout(60)
def test_require_tiling_of_thousands_of_irregular_regions_side_by_side_refused() -> None:
    # 4,000 columns, the last of them in two: no grid, and 8 million pairs.
    count = 4_000
    regions = [box((0, column), 2, 1) for column in range(count - 1)]
    regions += [box((0, count - 1), 1, 1), box((1, count - 1), 1, 1)]
    with pytest.raises(CheckpointError, match=rf"^here: {count + 1} regions are no grid, and too many to compare"):
        require_tiling(place_of((2, count), ordered(regions)), "here")


@pytest.mark.timeout(60)
def test_transfers_among_thousands_of_regions_touch_only_theirs() -> None:
    place = checkerboard(5_000, 1)
    for start in range(0, place.num_elements, place.num_elements // 50):
        found = list(transfers(place, start, start + 6))
        assert sum(math.prod(item.shape) for item in found) == 6
        assert all(abs(item.region.start[0] - start // 3) <= 2 for item in found)
