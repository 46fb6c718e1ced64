"""torch.save archives that were tampered with below the level of zipfile's writer, and pickles that pass its checksum."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.checkpoints.inert_pickle import RefusedPickle
from tasks.checkpoints.regions import Region
from tasks.checkpoints.safetensors_header import CheckpointError
from tasks.checkpoints.torch_archive import locate_elements

HYPOTHESIS = settings(max_examples=400, deadline=None, derandomize=True, database=None)
WHERE = "s3://bucket/run/__0_0.distcp: the chunk at byte 11"
END_RECORD_BYTES = 22
BEFORE, AFTER = b"\xa5" * 11, b"\x5a" * 5000
TENSOR = torch.arange(12.0).reshape(3, 4)
RAW = TENSOR.numpy().tobytes()


def archived(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


WHOLE = archived(TENSOR)
WIDE = archived(torch.arange(40_000.0)[100:30_100])


def locate(data: bytes, *, length: int | None = None, after: bytes = AFTER) -> int:
    stored = BEFORE + data + after
    region = Region(
        key="k",
        offset=len(BEFORE),
        start=(0, 0),
        shape=(3, 4),
        archive_bytes=len(data) if length is None else length,
    )
    return locate_elements(lambda start, end: stored[start:end], region, "F32", WHERE) - len(BEFORE)


def require_refused(data: bytes, match: str = ".", **options: Any) -> CheckpointError:
    with pytest.raises(CheckpointError, match=match) as caught:
        locate(data, **options)
    assert WHERE in str(caught.value)
    return caught.value


def require_inside_or_refused(data: bytes) -> None:
    first, message = 0, WHERE
    try:
        first = locate(data)
    except CheckpointError as error:
        message = str(error)
    assert 0 <= first <= max(0, len(data) - len(RAW))
    assert message.startswith(WHERE)
    assert len(message) < 2000


def with_pickle(data: bytes) -> bytes:
    """The archive of ``TENSOR`` with this ``data.pkl``, checksums right."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(WHOLE)) as old, zipfile.ZipFile(buffer, "w") as new:
        for item in old.infolist():
            new.writestr(item.filename, data if item.filename.endswith("data.pkl") else old.read(item))
    return buffer.getvalue()


with zipfile.ZipFile(io.BytesIO(WHOLE)) as _archive:
    PICKLE = _archive.read("archive/data.pkl")
    LOCAL = _archive.getinfo("archive/data/0").header_offset
    DIRECTORY = WHOLE.rindex(b"archive/data/0") - 46  # of its entry, whose fixed part has 46 bytes


def patched(place: int, new: bytes) -> bytes:
    return WHOLE[:place] + new + WHOLE[place + len(new) :]


def test_locate_elements_of_the_unchanged_archive_finds_them() -> None:
    for data in (WHOLE, with_pickle(PICKLE)):
        first = locate(data)
        assert data[first : first + len(RAW)] == RAW
    assert WHOLE[DIRECTORY : DIRECTORY + 4] == b"PK\x01\x02"


def test_locate_elements_of_a_large_view_reads_at_most_three_short_ranges() -> None:
    stored = BEFORE + WIDE + AFTER
    reads: list[tuple[int, int]] = []

    def read(start: int, end: int) -> bytes:
        reads.append((start, end))
        return stored[start:end]

    region = Region(key="k", offset=len(BEFORE), start=(0,), shape=(30_000,), archive_bytes=len(WIDE))
    first = locate_elements(read, region, "F32", WHERE)
    assert stored[first : first + 120_000] == torch.arange(100.0, 30_100.0).numpy().tobytes()
    assert len(reads) <= 3
    assert all(len(BEFORE) <= a <= b <= len(BEFORE) + len(WIDE) and b - a <= 65536 for a, b in reads)


@pytest.mark.parametrize("protocol", [2, 4])
def test_locate_elements_data_pkl_that_names_os_system_refused_and_not_run(tmp_path: Path, protocol: int) -> None:
    marker = tmp_path / "ran"
    named = b"cos\nsystem\n" if protocol == 2 else b"\x8c\x02os\x8c\x06system\x93"
    command = f"touch {marker}".encode()
    call = b"\x80" + bytes([protocol]) + named + b"X" + struct.pack("<I", len(command)) + command + b"\x85R."
    assert isinstance(require_refused(with_pickle(call), r"os\.system"), RefusedPickle)
    assert not marker.exists()


def test_locate_elements_truncated_anywhere_refused() -> None:
    for length in range(len(WHOLE)):
        require_refused(WHOLE[:length])


@pytest.mark.parametrize("after", [b"", AFTER], ids=["end of object", "other bytes"])
def test_locate_elements_of_a_truncated_archive_of_the_announced_length_refused(after: bytes) -> None:
    for length in range(len(WHOLE)):
        # Other bytes may stand for the last record: its 64-bit twin before it says where the directory is.
        if length <= len(WHOLE) - END_RECORD_BYTES or not after:
            require_refused(WHOLE[:length], length=len(WHOLE), after=after)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (patched(DIRECTORY + 8, b"\x01\x00"), "encrypted"),
        (patched(LOCAL, b"XX"), "points at no member"),
        (patched(LOCAL + 28, b"\xff\xff"), "are needed"),
        (patched(LOCAL + 26, b"\xff\xff"), "are needed"),
        (patched(DIRECTORY + 24, struct.pack("<I", 47)), "bytes 0 to 48 are needed"),
        (patched(DIRECTORY + 24, struct.pack("<I", 2**31)), "are needed"),
        (patched(DIRECTORY + 42, struct.pack("<I", len(WHOLE) - 10)), "points at no member"),
        (patched(DIRECTORY + 42, struct.pack("<I", 2**31)), "."),
        (patched(DIRECTORY + 10, b"\x63\x00"), "compressed"),
        (bytes(len(WHOLE)), "not a torch.save archive"),
        (b"PK\x05\x06" + bytes(18), "not a torch.save archive"),
        (b"", "."),
    ],
    ids=[
        "encrypted",
        "no local header",
        "long extra",
        "long name",
        "short size",
        "huge size",
        "at the end",
        "far away",
        "method",
        "zeros",
        "empty zip",
        "empty",
    ],
)
def test_locate_elements_with_a_directory_that_lies_refused(data: bytes, message: str) -> None:
    require_refused(data, message)


@HYPOTHESIS
@given(st.binary(max_size=300))
def test_locate_elements_in_garbage_refused(data: bytes) -> None:
    require_refused(data)


@HYPOTHESIS
@given(st.integers(0, 1), st.data())
def test_locate_elements_in_a_damaged_directory_raises_nothing_else(tail: int, data: st.DataObject) -> None:
    damaged = bytearray(WHOLE)
    low = WHOLE.index(b"PK\x01\x02") if tail else LOCAL
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(low, len(damaged) - 1))
        damaged[place] = data.draw(st.one_of(st.sampled_from([0, 1, 255]), st.integers(0, 255)))
    require_inside_or_refused(bytes(damaged))


@HYPOTHESIS
@given(data=st.data())
def test_locate_elements_with_a_changed_pickle_of_right_checksum_raises_nothing_else(data: st.DataObject) -> None:
    damaged = bytearray(PICKLE)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(damaged) - 1))
        new = data.draw(st.one_of(st.binary(max_size=3), st.sampled_from([b"N", b")", b"]", b"}", b"\x88", b"K\x00"])))
        damaged[place : place + data.draw(st.integers(0, 3))] = new
    require_inside_or_refused(with_pickle(bytes(damaged)))
