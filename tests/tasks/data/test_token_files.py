from __future__ import annotations

import pickle
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from cluster.errors import ObjectTruncated
from cluster.storage import open_store
from configs.errors import UserError
from tasks.data.megatron_index import build_index, read_index
from tasks.data.token_files import TokenReader, open_tokens

CODES = {"<u1": 1, "<i2": 3, "<i4": 4, "<i8": 5, "<u2": 8}
GENERATOR = np.random.default_rng(7)


def write_megatron(
    prefix: Path, sequences: list[NDArray[np.integer]], borders: list[int], dtype: str = "<u2"
) -> NDArray[np.integer]:
    """Megatron's two files by the book: an implementation of its own, one field at a time."""
    with open(f"{prefix}.bin", "wb") as file:
        for sequence in sequences:
            file.write(sequence.astype(dtype).tobytes())
    with open(f"{prefix}.idx", "wb") as file:
        file.write(b"MMIDIDX\x00\x00")
        file.write(struct.pack("<Q", 1))
        file.write(struct.pack("<B", CODES[dtype]))
        file.write(struct.pack("<Q", len(sequences)))
        file.write(struct.pack("<Q", len(borders)))
        for sequence in sequences:
            file.write(struct.pack("<i", len(sequence)))
        position = 0
        for sequence in sequences:
            file.write(struct.pack("<q", position))
            position += len(sequence) * np.dtype(dtype).itemsize
        for border in borders:
            file.write(struct.pack("<q", border))
    return np.concatenate(sequences)


def read_megatron(prefix: Path) -> list[list[int]]:
    """Megatron's two files as Megatron reads them: sequences by offset and length."""
    index, tokens = Path(f"{prefix}.idx").read_bytes(), Path(f"{prefix}.bin").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    version, code, count, borders = struct.unpack_from("<QBQQ", index, 9)
    assert version == 1
    dtype = {value: key for key, value in CODES.items()}[code]
    lengths = struct.unpack_from(f"<{count}i", index, 34)
    offsets = struct.unpack_from(f"<{count}q", index, 34 + 4 * count)
    documents = struct.unpack_from(f"<{borders}q", index, 34 + 12 * count)
    assert len(index) == 34 + 12 * count + 8 * borders
    assert list(documents) == list(range(count + 1))
    return [
        np.frombuffer(tokens, dtype, length, offset).tolist() for length, offset in zip(lengths, offsets, strict=True)
    ]


def some_sequences(count: int = 20, top: int = 60_000) -> list[NDArray[np.integer]]:
    return [GENERATOR.integers(0, top, size=GENERATOR.integers(1, 30)) for _ in range(count)]


def check_ranges(reader: TokenReader, expected: NDArray[np.integer]) -> None:
    assert len(reader) == len(expected)
    assert np.array_equal(reader.read(0, len(reader)), expected)
    for _ in range(200):
        start, end = sorted(GENERATOR.integers(0, len(expected) + 1, size=2).tolist())
        assert np.array_equal(reader.read(start, end), expected[start:end])


@pytest.mark.parametrize("dtype", ["<u2", "<i4", "<i8"])
def test_megatron_files_read_as_one_row(tmp_path: Path, dtype: str) -> None:
    expected = write_megatron(tmp_path / "data", some_sequences(), [0, 3, 3, 20], dtype)
    for url in ("data", "data.bin", "data.idx"):
        reader = open_tokens(str(tmp_path / url))
        assert reader.dtype == np.dtype(dtype)
        check_ranges(reader, expected)


@pytest.mark.parametrize("name", ["uint8", "uint16", "uint32"])
def test_our_index_is_what_megatron_reads(tmp_path: Path, name: str) -> None:
    dtype = np.dtype(name).newbyteorder("<")
    sequences = some_sequences(50, top=250)
    (tmp_path / "ours.bin").write_bytes(np.concatenate(sequences).astype(dtype).tobytes())
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int32)
    (tmp_path / "ours.idx").write_bytes(b"".join(build_index(lengths, dtype)))
    assert read_megatron(tmp_path / "ours") == [sequence.tolist() for sequence in sequences]
    check_ranges(open_tokens(str(tmp_path / "ours.bin")), np.concatenate(sequences))
    theirs = {"uint8": "<u1", "uint16": "<u2", "uint32": "<i4"}[name]
    write_megatron(tmp_path / "theirs", sequences, list(range(51)), theirs)
    assert (tmp_path / "ours.idx").read_bytes() == (tmp_path / "theirs.idx").read_bytes()


def test_index_is_checked_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.data.megatron_index._CHECKED_AT_ONCE", 7)
    sequences = some_sequences(30)
    write_megatron(tmp_path / "data", sequences, list(range(31)))
    store = open_store(str(tmp_path))
    index = read_index(store, "data.idx", store.size("data.bin"))
    assert (index.sequences, index.documents, index.tokens) == (30, 30, sum(map(len, sequences)))
    for number, cure in ((0, "does not begin where"), (7, "does not begin where"), (29, "does not begin where")):
        data = bytearray((tmp_path / "data.idx").read_bytes())
        struct.pack_into("<q", data, 34 + 4 * 30 + 8 * number, 12345)
        (tmp_path / "bad.idx").write_bytes(data)
        with pytest.raises(UserError, match=rf"sequence {number} {cure}"):
            read_index(store, "bad.idx", store.size("data.bin"))


def damaged(kind: str, data: bytearray) -> bytes:
    """An index of 4 sequences and borders 0..4 with one thing wrong."""
    at_lengths, at_offsets, at_borders = 34, 34 + 16, 34 + 48
    changes = {
        "magic": ("<9s", 0, b"NOTINDEX\0"),
        "version": ("<Q", 9, 2),
        "floating point": ("<B", 17, 7),
        "unknown code": ("<B", 17, 99),
        "other width": ("<B", 17, 4),
        "many sequences": ("<Q", 18, (1 << 63) + 1),
        "fewer sequences": ("<Q", 18, 3),
        "many borders": ("<Q", 26, 1 << 60),
        "negative length": ("<i", at_lengths + 4, -5),
        "long length": ("<i", at_lengths + 12, 1 << 30),
        "offset past the end": ("<q", at_offsets + 24, 1 << 40),
        "negative offset": ("<q", at_offsets, -2),
        "falling border": ("<q", at_borders + 16, 1),
        "first border": ("<q", at_borders, 1),
        "last border": ("<q", at_borders + 32, 9),
    }
    if kind == "cut off":
        return bytes(data[:-1])
    if kind == "header cut off":
        return bytes(data[:20])
    if kind == "empty":
        return b""
    if kind == "longer":
        return bytes(data) + b"\0\0\0\0"
    form, at, value = changes[kind]
    if kind == "falling border":
        struct.pack_into("<q", data, at_borders + 8, 3)
    struct.pack_into(form, data, at, value)
    return bytes(data)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("magic", "no Megatron index"),
        ("version", "version 2 is not known"),
        ("floating point", "code 7 is not of token ids"),
        ("unknown code", "code 99"),
        ("other width", "does not begin where"),
        ("many sequences", "cut off, or multimodal"),
        ("fewer sequences", "cut off, or multimodal"),
        ("many borders", "cut off, or multimodal"),
        ("negative length", "sequence 1 has a negative length"),
        ("long length", "need .* bytes, the .bin has"),
        ("offset past the end", "sequence 3 does not begin"),
        ("negative offset", "sequence 0 does not begin"),
        ("falling border", "borders do not rise"),
        ("first border", "borders do not rise from 0"),
        ("last border", "end at sequence 9 of 4"),
        ("cut off", "cut off, or multimodal"),
        ("header cut off", "too few"),
        ("empty", "too few"),
        ("longer", "cut off, or multimodal"),
    ],
)
def test_hostile_index_is_refused(tmp_path: Path, kind: str, message: str) -> None:
    write_megatron(tmp_path / "data", some_sequences(4), [0, 1, 2, 3, 4])
    index = tmp_path / "data.idx"
    index.write_bytes(damaged(kind, bytearray(index.read_bytes())))
    with pytest.raises(UserError, match=rf"data\.idx: .*{message}"):
        open_tokens(str(tmp_path / "data"))


@pytest.mark.parametrize("change", [-2, 2])
def test_megatron_bin_of_another_size_is_refused(tmp_path: Path, change: int) -> None:
    write_megatron(tmp_path / "data", some_sequences(4), [0, 4])
    data = (tmp_path / "data.bin").read_bytes()
    (tmp_path / "data.bin").write_bytes(data[:change] if change < 0 else data + b"\0" * change)
    with pytest.raises(UserError, match="its sequences need"):
        open_tokens(str(tmp_path / "data"))


def test_nanogpt_files_read_as_one_row(tmp_path: Path) -> None:
    parts = [GENERATOR.integers(0, 50_257, size=size) for size in (100, 1, 700)]
    for number, part in enumerate(parts):
        (tmp_path / f"train_{number}.bin").write_bytes(part.astype("<u2").tobytes())
    check_ranges(open_tokens(str(tmp_path / "train_*.bin")), np.concatenate(parts))
    check_ranges(open_tokens(str(tmp_path / "train_2.bin")), parts[2])


def test_bare_file_of_a_said_dtype(tmp_path: Path) -> None:
    tokens = GENERATOR.integers(0, 1 << 31, size=50)
    (tmp_path / "data.bin").write_bytes(tokens.astype("<u4").tobytes())
    check_ranges(open_tokens(str(tmp_path / "data.bin"), dtype="uint32"), tokens)
    with pytest.raises(UserError, match="dtype 'float32' is not known"):
        open_tokens(str(tmp_path / "data.bin"), dtype="float32")
    (tmp_path / "odd.bin").write_bytes(b"\1\2\3")
    with pytest.raises(UserError, match="3 bytes are no whole number of uint16"):
        open_tokens(str(tmp_path / "odd.bin"))


def llmc(tokens: NDArray[np.integer], *, magic: int, version: int, dtype: str, count: int | None = None) -> bytes:
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    return header.tobytes() + tokens.astype(dtype).tobytes()


@pytest.mark.parametrize(("magic", "version", "dtype"), [(20240520, 1, "<u2"), (20240801, 7, "<u4")])
def test_llmc_header_is_read(tmp_path: Path, magic: int, version: int, dtype: str) -> None:
    tokens = GENERATOR.integers(0, 50_257, size=300)
    path = tmp_path / "data.bin"
    path.write_bytes(llmc(tokens, magic=magic, version=version, dtype=dtype))
    reader = open_tokens(str(path))
    assert reader.dtype == np.dtype(dtype)
    check_ranges(reader, tokens)
    path.write_bytes(llmc(tokens, magic=magic, version=99, dtype=dtype))
    with pytest.raises(UserError, match=r"llm\.c version 99 is not known"):
        open_tokens(str(path))
    for count in (299, 301, -1, 2**31 - 1):
        path.write_bytes(llmc(tokens, magic=magic, version=version, dtype=dtype, count=count))
        with pytest.raises(UserError, match="its header says"):
            open_tokens(str(path))


def test_a_glob_takes_bin_files_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_bytes(b"words")
    with pytest.raises(UserError, match=r"names no \.bin files"):
        open_tokens(str(tmp_path / "*"))
    (tmp_path / "a.bin").write_bytes(b"\1\0\2\0")
    assert open_tokens(str(tmp_path / "*")).read(0, 2).tolist() == [1, 2]


def test_files_of_two_dtypes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(llmc(np.arange(300), magic=20240801, version=7, dtype="<u4"))
    (tmp_path / "b.bin").write_bytes(b"\0" * 20)
    with pytest.raises(UserError, match="different dtypes"):
        open_tokens(str(tmp_path / "*.bin"))


def test_nothing_to_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.bin").write_bytes(b"")
    with pytest.raises(UserError, match="hold no tokens"):
        open_tokens(str(tmp_path / "empty.bin"))
    with pytest.raises(UserError, match="does not exist; give a folder"):
        open_tokens(str(tmp_path / "missing"))
    with pytest.raises(UserError, match=r"folder without manifest\.json"):
        open_tokens(str(tmp_path))


def test_a_bare_file_needs_no_suffix(tmp_path: Path) -> None:
    (tmp_path / "train.dat").write_bytes(np.arange(10, dtype="<u2").tobytes())
    assert open_tokens(str(tmp_path / "train.dat")).read(3, 5).tolist() == [3, 4]


def test_reads_outside_the_row_and_past_a_cut_file_fail(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(np.arange(10, dtype="<u2").tobytes())
    reader = open_tokens(str(path))
    for start, end in ((-1, 3), (0, 11), (5, 4)):
        with pytest.raises(IndexError):
            reader.read(start, end)
    assert reader.read(10, 10).tolist() == []
    path.write_bytes(b"\0\0")
    with pytest.raises(ObjectTruncated):
        reader.read(0, 10)


def test_a_reader_is_pickled_by_name_and_shared_by_threads(tmp_path: Path) -> None:
    tokens = GENERATOR.integers(0, 60_000, size=5000)
    for number in range(5):
        (tmp_path / f"{number}.bin").write_bytes(tokens[number * 1000 :][:1000].astype("<u2").tobytes())
    reader = open_tokens(str(tmp_path / "*.bin"))
    reader.read(0, 10)
    copy: TokenReader = pickle.loads(pickle.dumps(reader))
    with ThreadPoolExecutor(8) as pool:
        for start, part in zip(
            range(0, 4900, 7), pool.map(lambda at: copy.read(at, at + 100), range(0, 4900, 7)), strict=True
        ):
            assert np.array_equal(part, tokens[start : start + 100])
    copy.close()
    assert copy.read(0, 2).tolist() == tokens[:2].tolist()


def test_object_storage_is_read_by_range(monkeypatch: pytest.MonkeyPatch) -> None:
    from cluster.storage_fsspec import FsspecStore

    tokens = GENERATOR.integers(0, 60_000, size=100_000)
    open_store("memory://tokens").put("train.bin", tokens.astype("<u2").tobytes())
    asked: list[int] = []
    real = FsspecStore.read_range

    def spied(self: FsspecStore, key: str, start: int, end: int) -> bytes:
        asked.append(end - start)
        return real(self, key, start, end)

    monkeypatch.setattr(FsspecStore, "read_range", spied)
    reader = open_tokens("memory://tokens/train.bin")
    assert np.array_equal(reader.read(50_000, 50_010), tokens[50_000:50_010])
    assert sum(asked) <= 12 + 20


def test_reader_of_many_files_keeps_few_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.data.token_files.MAX_OPEN_FILES", 4)
    whole = np.arange(4000, dtype="<u2")
    for number in range(40):
        (tmp_path / f"{number:02d}.bin").write_bytes(whole[number * 100 : number * 100 + 100].tobytes())
    reader = open_tokens(f"{tmp_path}/*.bin")

    def read(start: int) -> bool:
        return bool(np.array_equal(reader.read(start, start + 250), whole[start : start + 250]))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, np.random.default_rng(1).integers(0, 3750, size=500).tolist()))
    opened = [link for link in Path("/proc/self/fd").iterdir() if str(tmp_path) in str(link.resolve())]
    assert 1 <= len(opened) <= 4
    reader.close()
    assert not [link for link in Path("/proc/self/fd").iterdir() if str(tmp_path) in str(link.resolve())]
