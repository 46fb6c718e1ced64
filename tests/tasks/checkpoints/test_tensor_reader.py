"""Ranges of elements read from wherever they lie, versus NumPy: bare bytes, many regions, torch.save archives."""

from __future__ import annotations

import io
import itertools
import math
import random
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import ObjectMissing, StorageError
from cluster.storage import Store, open_store
from tasks.checkpoints.regions import Region, TensorPlace, ordered, require_tiling
from tasks.checkpoints.safetensors_header import CheckpointError
from tasks.checkpoints.tensor_reader import TensorReader
from tasks.checkpoints.torch_archive import DTYPES

HYPOTHESIS = settings(max_examples=120, deadline=None, derandomize=True, database=None)
JUNK = b"\xa5" * 13


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def archive(tensor: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    return buffer.getvalue()


def randoms(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random bits: NaNs with payloads among them."""
    generator = torch.Generator().manual_seed(math.prod(shape))
    high = 2 if dtype == torch.bool else 256
    width = torch.empty(0, dtype=dtype).element_size()
    return torch.randint(0, high, (*shape, width), generator=generator, dtype=torch.uint8).view(dtype).reshape(shape)


def lay_out(
    store: Store,
    tensor: torch.Tensor,
    cuts: list[list[int]],
    *,
    archived: bool,
    together: bool = False,
    dtype: str = "F32",
) -> TensorPlace:
    """Store ``tensor`` cut into a grid, each cell bare or as an archive, each in an object of its own or all in one."""
    regions, objects, position = [], {}, 0
    spans = [list(itertools.pairwise([0, *cut, size])) for cut, size in zip(cuts, tensor.shape, strict=True)]
    for number, cell in enumerate(itertools.product(*spans)):
        part = tensor[tuple(slice(a, b) for a, b in cell)].clone(memory_format=torch.contiguous_format)
        data = archive(part) if archived else raw(part)
        key = "all" if together else f"sub/{number}"
        regions.append(
            Region(
                key=key,
                offset=position + len(JUNK),
                start=tuple(a for a, _ in cell),
                shape=tuple(part.shape),
                archive_bytes=len(data) if archived else 0,
            )
        )
        objects[key] = objects.get(key, b"") + JUNK + data
        position += len(JUNK) + len(data) if together else 0
    for key, data in objects.items():
        store.put(key, data)
    place = TensorPlace(dtype=dtype, shape=tuple(tensor.shape), regions=ordered(regions))
    require_tiling(place, "here")
    return place


def read(reader: TensorReader, place: TensorPlace, start: int, end: int) -> bytes:
    width = place.num_bytes // max(1, place.num_elements)
    # Guards on both sides: nothing beside the buffer may be written.
    data = bytearray(b"\x5a" * ((end - start) * width + 16))
    reader.read_into(place, start, end, memoryview(data)[8:-8])
    assert data[:8] == data[-8:] == b"\x5a" * 8
    return bytes(data[8:-8])


def require_same(reader: TensorReader, place: TensorPlace, tensor: torch.Tensor, start: int, end: int) -> None:
    expected = np.frombuffer(raw(tensor), dtype=f"V{tensor.element_size()}")[start:end].tobytes()
    assert read(reader, place, start, end) == expected


def some_ranges(size: int, count: int = 40) -> Iterator[tuple[int, int]]:
    yield from ((0, size), (0, 0), (size, size))
    chance = random.Random(size)
    for _ in range(count):
        start = chance.randint(0, size)
        yield start, chance.randint(start, size)


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path, memory_store: Store) -> Store:
    return open_store(str(tmp_path)) if request.param == "local" else memory_store


# One region, many regions, archives


@pytest.mark.parametrize("archived", [False, True])
@pytest.mark.parametrize(
    ("shape", "cuts"),
    [
        ((7, 5), [[], []]),
        ((7, 5), [[4], []]),
        ((7, 5), [[], [2]]),
        ((7, 5), [[1, 6], [1, 2]]),
        ((30,), [list(range(1, 30))]),
        ((3, 4, 5), [[], [3], []]),
        ((2, 3, 2, 5), [[1], [], [1], [4]]),
        ((1, 1, 6), [[], [], [2, 4]]),
        ((), []),
        ((1,), [[]]),
    ],
)
def test_read_into_any_grid_equals_numpy(
    shape: tuple[int, ...], cuts: list[list[int]], archived: bool, store: Store
) -> None:
    tensor = randoms(shape)
    place = lay_out(store, tensor, cuts, archived=archived)
    with TensorReader(store) as reader:
        for start, end in some_ranges(tensor.numel()):
            require_same(reader, place, tensor, start, end)


@HYPOTHESIS
@given(st.data())
def test_read_into_random_grid_and_range_equals_numpy(data: st.DataObject) -> None:
    store = open_store(f"memory://{uuid.uuid4().hex}")
    shape = data.draw(st.lists(st.integers(1, 5), max_size=4).map(tuple))
    cuts = [sorted(data.draw(st.sets(st.integers(1, n - 1), max_size=2))) if n > 1 else [] for n in shape]
    tensor = randoms(shape)
    place = lay_out(store, tensor, cuts, archived=data.draw(st.booleans()), together=data.draw(st.booleans()))
    with TensorReader(store) as reader:
        for _ in range(3):
            start = data.draw(st.integers(0, tensor.numel()))
            require_same(reader, place, tensor, start, data.draw(st.integers(start, tensor.numel())))


@pytest.mark.parametrize("archived", [False, True])
@pytest.mark.parametrize(("name", "stored"), DTYPES.items())
def test_read_into_every_dtype_is_bit_for_bit(name: str, stored: str, archived: bool, memory_store: Store) -> None:
    tensor = randoms((5, 6), getattr(torch, name))
    place = lay_out(memory_store, tensor, [[2], [1]], archived=archived, dtype=stored)
    with TensorReader(memory_store) as reader:
        for start, end in some_ranges(30, count=10):
            require_same(reader, place, tensor, start, end)


def test_read_into_several_archives_in_one_object_equals_numpy(store: Store) -> None:
    tensor = randoms((9, 4))
    place = lay_out(store, tensor, [[2, 3, 8], [1]], archived=True, together=True)
    with TensorReader(store) as reader:
        for start, end in some_ranges(36):
            require_same(reader, place, tensor, start, end)


def test_read_into_bare_regions_beside_archives_equals_numpy(memory_store: Store) -> None:
    tensor = randoms((4, 6))
    memory_store.put("bare", raw(tensor[:1]))
    memory_store.put("archive", JUNK + (data := archive(tensor[1:].clone())))
    regions = (
        Region(key="bare", offset=0, start=(0, 0), shape=(1, 6)),
        Region(key="archive", offset=len(JUNK), start=(1, 0), shape=(3, 6), archive_bytes=len(data)),
    )
    with TensorReader(memory_store) as reader:
        for start, end in some_ranges(24):
            require_same(reader, TensorPlace(dtype="F32", shape=(4, 6), regions=regions), tensor, start, end)


def test_read_into_archive_of_rows_of_a_larger_storage_reads_those_rows(memory_store: Store) -> None:
    # torch.save of a slice stores all of what it was cut from, and where the slice begins.
    tensor = randoms((9, 4))
    memory_store.put("x", data := archive(tensor[3:7]))
    region = Region(key="x", offset=0, start=(0, 0), shape=(4, 4), archive_bytes=len(data))
    with TensorReader(memory_store) as reader:
        for start, end in some_ranges(16):
            require_same(reader, TensorPlace(dtype="F32", shape=(4, 4), regions=(region,)), tensor[3:7], start, end)


def test_read_into_large_archive_equals_numpy(memory_store: Store) -> None:
    # Larger than what is read at its two ends to find the elements.
    tensor = randoms((64, 1000))
    place = lay_out(memory_store, tensor, [[31], []], archived=True)
    with TensorReader(memory_store) as reader:
        for start, end in some_ranges(tensor.numel(), count=10):
            require_same(reader, place, tensor, start, end)


def test_read_bytes_reads_the_object_as_it_is(memory_store: Store) -> None:
    memory_store.put("x", b"0123456789")
    data = bytearray(4)
    with TensorReader(memory_store) as reader:
        reader.read_bytes("x", 3, memoryview(data))
    assert data == b"3456"


# Many objects, many threads


def test_read_into_more_objects_than_are_kept_open_equals_numpy(tmp_path: Path) -> None:
    rows = 133
    tensor, store = randoms((rows, 3)), open_store(str(tmp_path))
    place = lay_out(store, tensor, [list(range(1, rows)), []], archived=False)
    with TensorReader(store) as reader:
        for start, end in some_ranges(3 * rows, count=20):
            require_same(reader, place, tensor, start, end)
        open_files = [path.resolve() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
        assert 0 < sum(path.is_relative_to(tmp_path.resolve()) for path in open_files) <= 64
    open_files = [path.resolve() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert not any(path.is_relative_to(tmp_path.resolve()) for path in open_files)


@pytest.mark.parametrize("archived", [False, True])
def test_read_into_from_many_threads_equals_numpy(archived: bool, tmp_path: Path) -> None:
    # More objects than are kept open: while one thread reads from a file, others push it out.
    rows, threads = 104, 8
    tensor, store = randoms((rows, 3)), open_store(str(tmp_path))
    place = lay_out(store, tensor, [list(range(1, rows)), [2]], archived=archived)
    together = threading.Barrier(threads)
    with TensorReader(store) as reader, ThreadPoolExecutor(threads) as pool:

        def work(seed: int) -> None:
            chance = random.Random(seed)
            together.wait(timeout=60)
            for _ in range(30):
                start = chance.randint(0, 3 * rows)
                require_same(reader, place, tensor, start, chance.randint(start, min(3 * rows, start + 60)))

        for done in [pool.submit(work, seed) for seed in range(threads)]:
            done.result(timeout=120)


# What storage or archives do not hold


def test_read_into_missing_object_refused(store: Store) -> None:
    place = TensorPlace(dtype="F32", shape=(2,), regions=(Region(key="lost", offset=0, start=(0,), shape=(2,)),))
    with TensorReader(store) as reader, pytest.raises(ObjectMissing, match="lost"):
        read(reader, place, 0, 2)


@pytest.mark.parametrize("archived", [False, True])
def test_read_into_truncated_object_refused(archived: bool, store: Store) -> None:
    place = lay_out(store, randoms((4, 6)), [[], [3]], archived=archived)
    key = place.regions[1].key
    store.put(key, store.read(key)[:-3])
    with TensorReader(store) as reader, pytest.raises((StorageError, CheckpointError), match=key):
        read(reader, place, 0, 24)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(3, 2), r"holds F32 \[3, 2\], the metadata says F32 \[2, 3\]"),
        (torch.zeros(2, 3, dtype=torch.float64), r"holds F64 \[2, 3\], the metadata says F32 \[2, 3\]"),
        (torch.zeros(2, 3, dtype=torch.int32), r"holds I32 \[2, 3\], the metadata says F32 \[2, 3\]"),
        (torch.zeros(3, 2).t(), "not row-major"),
    ],
)
def test_read_into_archive_of_another_tensor_refused(tensor: torch.Tensor, message: str, memory_store: Store) -> None:
    memory_store.put("x", data := archive(tensor))
    region = Region(key="x", offset=0, start=(0, 0), shape=(2, 3), archive_bytes=len(data))
    place = TensorPlace(dtype="F32", shape=(2, 3), regions=(region,))
    with (
        TensorReader(memory_store) as reader,
        pytest.raises(CheckpointError, match=rf"/x: the chunk at byte 0.*{message}"),
    ):
        read(reader, place, 0, 6)


def test_read_into_after_a_refused_archive_reads_others(memory_store: Store) -> None:
    good = lay_out(memory_store, tensor := randoms((2, 3)), [[], []], archived=True)
    memory_store.put("bad", b"no archive, but some hundred bytes of text" * 9)
    bad = Region(key="bad", offset=0, start=(0, 0), shape=(2, 3), archive_bytes=300)
    with TensorReader(memory_store) as reader:
        for _ in range(2):
            with pytest.raises(CheckpointError, match=r"/bad: the chunk at byte 0.*: not a torch\.save archive"):
                read(reader, TensorPlace(dtype="F32", shape=(2, 3), regions=(bad,)), 0, 6)
            require_same(reader, good, tensor, 1, 5)
