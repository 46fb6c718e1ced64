"""torch.save archives: elements are found where torch put them, by few small reads, and anything else is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import zipfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.checkpoints.inert_pickle import RefusedPickle
from tasks.checkpoints.regions import Region
from tasks.checkpoints.safetensors_header import CheckpointError
from tasks.checkpoints.torch_archive import DTYPES, END_BYTES, locate_elements

HYPOTHESIS = settings(max_examples=300, deadline=None, derandomize=True, database=None)
WHERE = "s3://bucket/run/__0_0.distcp: the chunk at byte 7"
BEFORE = b"\xa5" * 7
TENSOR = torch.arange(12.0).reshape(3, 4)
MAX_READS = 3
MAX_READ_BYTES = 64 << 10
Member = tuple[bytes, int]


def archived(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def region_of(shape: tuple[int, ...], data: bytes) -> Region:
    return Region(key="k", offset=len(BEFORE), start=(0,) * len(shape), shape=shape, archive_bytes=len(data))


def locate(data: bytes, shape: tuple[int, ...] = (3, 4), dtype: str = "F32") -> int:
    """Where the elements begin in the object, which has other bytes before and after the archive."""
    stored = BEFORE + data + b"\xa5" * 9
    return locate_elements(lambda start, end: stored[start:end], region_of(shape, data), dtype, WHERE)


def require_found(tensor: torch.Tensor, dtype: str) -> None:
    data = archived(tensor)
    first = locate(data, tuple(tensor.shape), dtype)
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    assert (BEFORE + data)[first : first + len(raw)] == raw


def members(data: bytes) -> dict[str, Member]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {item.filename: (archive.read(item), item.compress_type) for item in archive.infolist()}


def rebuilt(change: Callable[[dict[str, Member]], object]) -> bytes:
    """The archive of ``TENSOR`` with other members."""
    made = members(archived(TENSOR))
    change(made)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, (data, compression) in made.items():
            archive.writestr(name, data, compression)
    return buffer.getvalue()


# What torch writes


@pytest.mark.parametrize("dtype", DTYPES)
def test_locate_elements_of_every_dtype_finds_their_bytes(dtype: str) -> None:
    require_found(torch.arange(6).reshape(2, 3).to(getattr(torch, dtype)), DTYPES[dtype])


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 4), (2, 0), (5,), (1, 1, 1), (2, 3, 4, 5), (70_000,)])
def test_locate_elements_of_every_shape_finds_their_bytes(shape: tuple[int, ...]) -> None:
    require_found(torch.arange(float(math.prod(shape))).reshape(shape), "F32")


def test_locate_elements_of_a_view_counts_from_its_first_element() -> None:
    # The storage is saved whole: 10 elements, of which four from the third on are meant.
    require_found(torch.arange(10)[3:7], "I64")


@pytest.mark.parametrize("strides", [(4, 99, 1), (4, 0, 1), (4, 4, 1)])
def test_locate_elements_strides_of_single_rows_do_not_matter(strides: tuple[int, ...]) -> None:
    require_found(torch.arange(12.0).as_strided((3, 1, 4), strides), "F32")


def test_locate_elements_reads_little() -> None:
    data = archived(torch.zeros(1 << 20))
    reads: list[int] = []

    def read(start: int, end: int) -> bytes:
        reads.append(end - start)
        return (BEFORE + data)[start:end]

    locate_elements(read, region_of((1 << 20,), data), "F32", WHERE)
    assert len(reads) <= MAX_READS
    assert sum(reads) <= 2 * END_BYTES <= MAX_READ_BYTES


def test_locate_elements_of_an_archive_with_64_bit_fields_finds_them() -> None:
    # As for elements of 4 GiB and more: sizes and offsets of every member in extra fields.
    made, buffer = members(archived(TENSOR)), io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, (data, _) in made.items():
            with archive.open(name, "w", force_zip64=True) as member:
                member.write(data)
    first = locate(buffer.getvalue()) - len(BEFORE)
    assert buffer.getvalue()[first : first + 48] == TENSOR.numpy().tobytes()


def test_locate_elements_of_an_older_archive_without_byte_order_finds_them() -> None:
    data = rebuilt(lambda made: made.pop("archive/byteorder"))
    first = locate(data) - len(BEFORE)
    assert data[first : first + 48] == TENSOR.numpy().tobytes()


# What else may be there


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (TENSOR.t(), r"holds F32 \[4, 3\], the metadata says F32 \[3, 4\]"),
        (TENSOR.double(), r"holds F64 \[3, 4\], the metadata says F32 \[3, 4\]"),
        (TENSOR.int(), "holds I32"),
        (TENSOR.to(torch.float8_e4m3fn), "holds F8_E4M3"),
        (TENSOR.to(torch.float8_e4m3fnuz), "names 'torch.float8_e4m3fnuz'"),
        (TENSOR.to(torch.complex64), "names 'torch.ComplexFloatStorage'"),
        (TENSOR.reshape(12), r"holds F32 \[12\]"),
        (TENSOR.reshape(1, 3, 4), r"holds F32 \[1, 3, 4\]"),
        (torch.arange(12.0).reshape(4, 3).t(), r"strides \[1, 3\] are not row-major"),
        (torch.arange(24.0).reshape(3, 8)[:, ::2], "not row-major"),
        (torch.tensor(1.0).expand(3, 4), r"strides \[0, 0\] are not row-major"),
        (torch.complex(TENSOR, TENSOR).conj().imag, "not row-major|view"),
        (torch._neg_view(TENSOR), "negated or conjugated view"),
        ([TENSOR], "no plain tensor"),
        ({"a": 1}, "no plain tensor"),
        (torch.nn.Parameter(TENSOR), "names 'torch._utils._rebuild_parameter'"),
        (TENSOR.to_sparse(), "names 'torch"),
        (torch.nn.Linear(4, 3), "names '"),
    ],
)
def test_locate_elements_of_anything_else_refused(tensor: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"{WHERE}: .*{message}"):
        locate(archived(tensor))


def test_locate_elements_whose_pickle_would_run_a_command_refused() -> None:
    class Calls:
        def __reduce__(self) -> tuple[Any, ...]:
            return print, ("ran",)

    with pytest.raises(RefusedPickle, match=r"names .__builtin__\.print"):
        locate(archived(Calls()))


def test_locate_elements_in_the_format_before_archives_refused() -> None:
    buffer = io.BytesIO()
    torch.save(TENSOR, buffer, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=f"{WHERE}: not a torch.save archive"):
        locate(buffer.getvalue())


def compress(name: str, method: int = zipfile.ZIP_DEFLATED) -> Callable[[dict[str, Member]], object]:
    return lambda made: made.update({name: (made[name][0], method)})


def replace(name: str, data: bytes) -> Callable[[dict[str, Member]], object]:
    return lambda made: made.update({name: (data, zipfile.ZIP_STORED)})


STATED = members(archived(TENSOR))["archive/data.pkl"][0]


def restated(old: bytes, new: bytes) -> Callable[[dict[str, Member]], object]:
    assert STATED.count(old) == 1
    return replace("archive/data.pkl", STATED.replace(old, new))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (compress("archive/data/0"), "elements are compressed"),
        (compress("archive/data/0", zipfile.ZIP_LZMA), "elements are compressed"),
        (compress("archive/data.pkl"), "is compressed or too large"),
        (compress("archive/byteorder"), "is compressed or too large"),
        (replace("archive/byteorder", b"little" * 20_000), "is compressed or too large"),
        (replace("archive/data.pkl", b"\x80\x02" + b"N0" * 40_000 + b"N."), "is compressed or too large"),
        (replace("archive/byteorder", b"big"), "not little-endian"),
        (replace("archive/data/0", bytes(47)), "holds 47 bytes of elements, bytes 0 to 48 are needed"),
        (replace("archive/data/0", b""), "holds 0 bytes of elements"),
        (replace("archive/data.pkl", b""), "damaged pickle"),
        (lambda made: made.pop("archive/data/0"), "not a torch.save archive"),
        (lambda made: made.pop("archive/data.pkl"), "not a torch.save archive"),
        (lambda made: made.clear(), "not a torch.save archive"),
        # storage_offset, (3, 4): 0 becomes 1, -1, a list; the shape a number; the strides of another length.
        (restated(b"QK\x00K\x03", b"QK\x01K\x03"), "bytes 4 to 52 are needed"),
        (restated(b"QK\x00K\x03", b"QJ\xff\xff\xff\xffK\x03"), "the archive holds"),
        (restated(b"QK\x00K\x03", b"Q]K\x03"), "no plain tensor"),
        (restated(b"K\x03K\x04\x86", b"K\x03"), "no plain tensor"),
        (restated(b"K\x03K\x04\x86", b"K\x03]\x86"), "holds F32 not of integers"),
        (restated(b"K\x04K\x01\x86", b"K\x01\x85"), r"strides \[1\] are not row-major"),
        (restated(b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x001"), "not a torch.save archive"),
    ],
)  # fmt: skip
def test_locate_elements_in_an_archive_that_lies_refused(
    change: Callable[[dict[str, Member]], object], message: str
) -> None:
    with pytest.raises(CheckpointError, match=rf"{WHERE}: .*{message}"):
        locate(rebuilt(change))


def test_locate_elements_that_end_after_the_chunk_refused() -> None:
    # The archive is whole, the metadata says that it is shorter.
    data = archived(TENSOR)
    for length in range(1, len(data)):
        region = dataclasses.replace(region_of((3, 4), data), archive_bytes=length)
        with pytest.raises(CheckpointError, match=WHERE):
            locate_elements(lambda start, end: (BEFORE + data)[start:end], region, "F32", WHERE)


@HYPOTHESIS
@given(data=st.data())
def test_locate_elements_in_a_damaged_archive_raises_nothing_else(data: st.DataObject) -> None:
    damaged = bytearray(archived(TENSOR))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(damaged) - 1))
        damaged[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    with contextlib.suppress(CheckpointError):
        first = locate(bytes(damaged)) - len(BEFORE)
        assert 0 <= first <= len(damaged) - 48
