from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.data_files import DataFile, list_data_files
from configs.errors import UserError
from tasks.data.documents import Document, DocumentOptions, Stretch, read_documents, whole

SKIP = DocumentOptions(malformed="skip")


def read(path: Path | str, options: DocumentOptions | None = None) -> list[str]:
    """Texts of all documents; what is left out stands as <reason>."""
    (file,) = list_data_files(str(path))
    options = options or DocumentOptions()
    records = read_documents(whole(file), options)
    return [record.text if isinstance(record, Document) else f"<{record.reason}>" for record in records]


def read_cut(path: Path, cuts: list[int], options: DocumentOptions) -> list[str]:
    (file,) = list_data_files(str(path))
    borders = [0, *cuts, file.bytes]
    stretches = [Stretch(file=file, start=a, end=b) for a, b in itertools.pairwise(borders)]
    records = [record for stretch in stretches for record in read_documents(stretch, options)]
    return [record.text for record in records if isinstance(record, Document)]


def lines_of(*values: object) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def test_text_file_is_one_document_or_one_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\n\nthree")
    assert read(path) == ["one\r\ntwo\n\nthree"]
    assert read(path, DocumentOptions(txt_documents="line")) == ["one", "two", "<empty>", "three"]


def test_empty_text_file_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_bytes(b"")
    assert read(tmp_path / "a.md") == ["<empty>"]


def test_text_that_is_not_utf8_names_the_byte(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"a\.txt: byte 3 is not UTF-8 .*iconv"):
        read(tmp_path / "a.txt")
    assert read(tmp_path / "a.txt", SKIP) == ["<malformed>"]


def test_json_lines_take_the_named_field(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        lines_of({"text": "one", "body": "1"}, {"text": "", "body": "2"}) + b"\n" + lines_of({"text": "é"})
    )
    assert read(path) == ["one", "<empty>", "é"]
    with pytest.raises(UserError, match=r"line 4: has no field 'body' \(fields: 'text'\)"):
        read(path, DocumentOptions(text_field="body"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "is no JSON"),
        (b"[1, 2]", "holds list, not an object"),
        (b'{"text": 7}', "field 'text' is int, not text"),
        (b'{"text": null}', "is NoneType, not text"),
        (b'{"text": "\\ud800"}', "half of a surrogate pair"),
        (b"[" * 100_000, "is no JSON"),
        (b'{"text": "\xff"}', "is no JSON"),
    ],
)
def test_malformed_json_line_is_named_or_skipped(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of({"text": "good"}) + line + b"\n" + lines_of({"text": "after"}))
    with pytest.raises(UserError, match=rf"a\.jsonl, line 2: .*{message}.*skip malformed"):
        read(path)
    assert read(path, SKIP) == ["good", "<malformed>", "after"]


def test_a_file_cut_anywhere_gives_each_line_once(tmp_path: Path) -> None:
    texts = ["a", "bcd", "é" * 5, "x y"]
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of(*({"text": text} for text in texts)).removesuffix(b"\n"))
    size = path.stat().st_size
    for cut in range(1, size):
        assert read_cut(path, [cut], DocumentOptions()) == texts, cut
    assert read_cut(path, list(range(1, size)), DocumentOptions()) == texts


def test_an_error_in_a_later_stretch_says_where_its_count_begins(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of({"text": "good"}) + b"{\n")
    (file,) = list_data_files(str(path))
    stretch = Stretch(file=file, start=5, end=file.bytes)
    with pytest.raises(UserError, match="line 1 after byte 5"):
        list(read_documents(stretch, DocumentOptions()))


def test_compressed_json_lines_read_alike(tmp_path: Path) -> None:
    texts = [f"document {number} " * 50 for number in range(400)]
    data = lines_of(*({"text": text} for text in texts))
    half = len(data) // 2
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data[:half]) + gzip.compress(data[half:]))
    codec = pa.Codec("zstd")
    frames = [codec.compress(part, asbytes=True) for part in (data[:half], data[half:])]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    assert read(tmp_path / "a.jsonl.gz") == texts
    assert read(tmp_path / "a.jsonl.zst") == texts


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_cut_off_compressed_file_is_refused(tmp_path: Path, suffix: str) -> None:
    data = lines_of(*({"text": f"{number} " * 100} for number in range(1000)))
    packed = gzip.compress(data) if suffix == "gz" else pa.Codec("zstd").compress(data, asbytes=True)
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(UserError, match=rf"a\.jsonl\.{suffix}' "):
        read(path, SKIP)
    path.write_bytes(b"this is not compressed")
    with pytest.raises(UserError, match=rf"a\.jsonl\.{suffix}' "):
        read(path, SKIP)


def test_parquet_rows_stream_by_row_group(tmp_path: Path) -> None:
    texts = [f"row {number}" for number in range(10)] + ["", None]
    table = pa.table({"body": texts, "number": list(range(12))})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=5)
    options = DocumentOptions(text_field="body")
    assert read(tmp_path / "a.parquet", options) == [text or "<empty>" for text in texts]
    (file,) = list_data_files(str(tmp_path / "a.parquet"))
    # Three row groups: each goes where its share of the bytes begins.
    third = file.bytes // 3
    records = list(read_documents(Stretch(file=file, start=1, end=third + 1), options))
    assert [record.text for record in records if isinstance(record, Document)] == texts[5:10]
    for cut in range(1, file.bytes, 7):
        assert read_cut(tmp_path / "a.parquet", [cut], options) == texts[:10]


def test_parquet_columns_of_other_text_types(tmp_path: Path) -> None:
    for kind in (pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        pq.write_table(pa.table({"text": pa.array(["a", "b"]).cast(kind)}), tmp_path / "a.parquet")
        assert read(tmp_path / "a.parquet") == ["a", "b"]


def test_parquet_without_the_column_or_of_another_type(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["a"], "number": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="no column 'text'; columns: body, number"):
        read(tmp_path / "a.parquet")
    with pytest.raises(UserError, match="column 'number' is int64, not text"):
        read(tmp_path / "a.parquet", DocumentOptions(text_field="number"))


def test_damaged_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 this is nothing PAR1")
    with pytest.raises(UserError, match=r"a\.parquet' .*damaged"):
        read(path)
    pq.write_table(pa.table({"text": ["word " * 500] * 50}), path, compression="zstd", use_dictionary=False)
    data = bytearray(path.read_bytes())
    data[20:60] = b"\xa5" * 40
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.parquet' "):
        read(path)


def test_format_can_be_said(tmp_path: Path) -> None:
    (tmp_path / "a.data").write_bytes(lines_of({"text": "one"}))
    assert read(tmp_path / "a.data", DocumentOptions(format="jsonl")) == ["one"]
    assert read(tmp_path / "a.data") == ['{"text": "one"}\n']


def test_files_of_any_fsspec_scheme_are_listed_with_sizes() -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/documents/b.jsonl", lines_of({"text": "b"}))
    fs.pipe_file("/documents/a.jsonl", lines_of({"text": "a"}))
    try:
        files = list_data_files("memory://documents/*.jsonl")
        assert [(file.url, file.bytes) for file in files] == [
            ("memory://documents/a.jsonl", 14),
            ("memory://documents/b.jsonl", 14),
        ]
        assert read("memory://documents/b.jsonl") == ["b"]
    finally:
        fs.rm("/documents", recursive=True)


def test_a_source_that_names_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no files; give a file"):
        list_data_files(str(tmp_path / "*.txt"))
    with pytest.raises(UserError, match="holds no files"):
        list_data_files(str(tmp_path / "missing"))


def test_a_file_that_went_away_is_named(tmp_path: Path) -> None:
    file = DataFile(url=str(tmp_path / "gone.txt"), bytes=3, version="")
    with pytest.raises(UserError, match=r"gone\.txt' does not exist"):
        list(read_documents(Stretch(file=file, start=0, end=3), DocumentOptions()))


def test_a_changed_file_has_another_version(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one")
    (before,) = list_data_files(str(tmp_path))
    (tmp_path / "a.txt").unlink()
    (tmp_path / "a.txt").write_bytes(b"two")
    (after,) = list_data_files(str(tmp_path))
    assert before.bytes == after.bytes
    assert before.version != after.version
