"""Stream documents from text, JSON lines and parquet files, plain or compressed, whole or in stretches.

A JSON line or a parquet row is a document; a text file is one, or each of its lines. Memory holds one document,
or the text column of one parquet row group.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, Literal

from cluster.data_files import DataFile, open_data
from configs.errors import UserError

if TYPE_CHECKING:
    # Imported where it is used: it takes a third of a second, and most sources are text.
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

Format = Literal["auto", "txt", "jsonl", "parquet"]
MAX_DOCUMENT_BYTES = 1 << 28
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
COMPRESSED_SUFFIXES = (".gz", ".zst")
_ROWS = 256
"""Parquet rows turned into text at a time."""


@dataclass(frozen=True, kw_only=True)
class DocumentOptions:
    """How files are read as documents."""

    format: Format = "auto"
    """``auto`` goes by the name: .jsonl, .ndjson and .json are JSON lines, .parquet is parquet, all else is text."""
    text_field: str = "text"
    """Field of a JSON line, or parquet column, that holds the text."""
    txt_documents: Literal["file", "line"] = "file"
    """What a document is in a text file."""
    malformed: Literal["refuse", "skip"] = "refuse"
    """Whether a document that cannot be read is an error, or left out and counted."""

    def __post_init__(self) -> None:
        if not self.text_field:
            raise UserError("the text field needs a name, such as 'text'")


@dataclass(frozen=True, kw_only=True)
class Document:
    """One document."""

    text: str
    """Its text; never empty."""
    place: str
    """File and line or row, for messages."""


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """What stood where a document was expected."""

    reason: Literal["empty", "malformed"]
    """Why it is left out."""


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """The documents that begin in a part of a file."""

    file: DataFile
    """The file."""
    start: int
    """First byte."""
    end: int
    """Byte after the last. Parquet row groups count as if all were of one size."""


Record = Document | Skipped


def format_of(url: str, options: DocumentOptions) -> Literal["txt", "jsonl", "parquet"]:
    """What the file holds, by ``options`` or by its name."""
    if options.format != "auto":
        return options.format
    name = url.removesuffix(".gz").removesuffix(".zst").lower()
    if name.endswith(".parquet"):
        return "parquet"
    return "jsonl" if name.endswith(_JSON_SUFFIXES) else "txt"


def whole(file: DataFile) -> Stretch:
    """All of ``file``."""
    return Stretch(file=file, start=0, end=file.bytes)


def is_divisible(file: DataFile, options: DocumentOptions) -> bool:
    """Whether parts of the file can be read without what stands before them."""
    kind = format_of(file.url, options)
    by_line = kind == "jsonl" or (kind == "txt" and options.txt_documents == "line")
    return kind == "parquet" or (by_line and not file.url.endswith(COMPRESSED_SUFFIXES))


def read_documents(stretch: Stretch, options: DocumentOptions) -> Iterator[Record]:
    """Documents of ``stretch`` in order, with what is left out in its place.

    Raises :class:`configs.errors.UserError` naming file, line or row and cure: always for a damaged file, and for
    a malformed document unless ``options.malformed`` says to skip it.
    """
    kind = format_of(stretch.file.url, options)
    if kind == "parquet":
        return _parquet_documents(stretch, options)
    if kind == "jsonl":
        return _line_documents(stretch, options, is_json=True)
    if options.txt_documents == "line":
        return _line_documents(stretch, options, is_json=False)
    return _file_document(stretch, options)


def skip_or_refuse(place: str, problem: str, options: DocumentOptions) -> Skipped:
    """The answer to a malformed document."""
    if options.malformed == "skip":
        return Skipped(reason="malformed")
    raise UserError(f"{place}: {problem}; mend it, or skip malformed documents")


def _file_document(stretch: Stretch, options: DocumentOptions) -> Iterator[Record]:
    url = stretch.file.url
    with open_text(url) as file:
        data = file.read(MAX_DOCUMENT_BYTES + 1)
    if len(data) > MAX_DOCUMENT_BYTES:
        raise UserError(
            f"{url}: one document of more than {MAX_DOCUMENT_BYTES >> 20} MiB; cut the file, or take each line as a document"
        )
    yield _text_record(data, url, options)


def _line_documents(stretch: Stretch, options: DocumentOptions, *, is_json: bool) -> Iterator[Record]:
    url = stretch.file.url
    with open_text(url) as file:
        position = _skip_to_line(file, stretch.start) if stretch.start else 0
        number = 0
        # A compressed file is read to its end: its size says nothing about its text.
        while position < stretch.end or url.endswith(COMPRESSED_SUFFIXES):
            line = file.readline(MAX_DOCUMENT_BYTES + 1)
            if not line:
                return
            position, number = position + len(line), number + 1
            place = f"{url}, line {number}" + (f" after byte {stretch.start}" if stretch.start else "")
            if len(line) > MAX_DOCUMENT_BYTES:
                raise UserError(f"{place}: longer than {MAX_DOCUMENT_BYTES >> 20} MiB; is this one document a line?")
            if is_json and line.isspace():
                continue  # most often the newline at the end
            yield _json_record(line, place, options) if is_json else _text_record(line.rstrip(b"\r\n"), place, options)


def _parquet_documents(stretch: Stretch, options: DocumentOptions) -> Iterator[Record]:
    url, column = stretch.file.url, options.text_field
    with open_parquet(url) as file:
        _require_text_column(file.schema_arrow, column, url)
        for group in range(file.num_row_groups):
            if not stretch.start <= group * stretch.file.bytes // file.num_row_groups < stretch.end:
                continue
            row = 0
            for batch in file.iter_batches(batch_size=_ROWS, row_groups=[group], columns=[column]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    yield (
                        Document(text=text, place=f"{url}, row {row} of row group {group}")
                        if text
                        else Skipped(reason="empty")
                    )


def _json_record(line: bytes, place: str, options: DocumentOptions) -> Record:
    try:
        value = json.loads(line.removeprefix(b"\xef\xbb\xbf"))
    except (ValueError, RecursionError) as error:
        return skip_or_refuse(place, f"is no JSON ({error})", options)
    if not isinstance(value, dict):
        return skip_or_refuse(
            place, f"holds {type(value).__name__}, not an object with {options.text_field!r}", options
        )
    if options.text_field not in value:
        fields = ", ".join(map(repr, list(value)[:10])) or "none"
        return skip_or_refuse(place, f"has no field {options.text_field!r} (fields: {fields})", options)
    text = value[options.text_field]
    if not isinstance(text, str):
        problem = f"field {options.text_field!r} is {type(text).__name__}, not text"
        return skip_or_refuse(place, problem, options)
    if not is_unicode(text):
        return skip_or_refuse(place, f"field {options.text_field!r} holds half of a surrogate pair", options)
    return Document(text=text, place=place) if text else Skipped(reason="empty")


def _text_record(data: bytes, place: str, options: DocumentOptions) -> Record:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return skip_or_refuse(place, f"byte {error.start} is not UTF-8 (convert it, for instance with iconv)", options)
    return Document(text=text, place=place) if text else Skipped(reason="empty")


def is_unicode(text: str) -> bool:
    """Whether ``text`` can be written as UTF-8; JSON may spell half of a surrogate pair."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _skip_to_line(file: BinaryIO, start: int) -> int:
    """Move to the first line that begins at ``start`` or after, and say where that is."""
    position = file.seek(start - 1)
    while piece := file.readline(1 << 20):
        position += len(piece)
        if piece.endswith(b"\n"):
            break
    return position


def _require_text_column(schema: pa.Schema, column: str, url: str) -> None:
    import pyarrow as pa

    if column not in schema.names:
        raise UserError(f"{url}: no column {column!r}; columns: {', '.join(schema.names[:20])}. Name the text column")
    kind = schema.field(column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise UserError(f"{url}: column {column!r} is {kind}, not text; name a text column, or cast it")


@contextlib.contextmanager
def open_text(url: str) -> Iterator[BinaryIO]:
    """A file of lines, decompressed if its name says so; :class:`UserError` that names it if it is damaged."""
    if url.endswith(".zst"):
        yield from _open_zstandard(url)
        return
    try:
        with open_data(url) as raw:
            if url.endswith(".gz"):
                with gzip.open(raw) as unzipped:
                    yield unzipped  # type: ignore[misc]
            else:
                yield raw
    except (EOFError, zlib.error) as error:
        raise UserError(f"data file {url!r} is damaged or incomplete ({error}); copy it again") from error


def _open_zstandard(url: str) -> Iterator[BinaryIO]:
    import pyarrow as pa

    try:
        with open_data(url) as raw, pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd") as unzipped:
            yield io.BufferedReader(unzipped)  # type: ignore[type-var, unused-ignore]
    except pa.ArrowException as error:
        raise UserError(f"data file {url!r} is damaged or incomplete ({error}); copy it again") from error


@contextlib.contextmanager
def open_parquet(url: str) -> Iterator[pq.ParquetFile]:
    """A parquet file; :class:`UserError` that names it if it is none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with open_data(url) as raw, pq.ParquetFile(raw) as file:
            yield file
    except pa.ArrowException as error:
        raise UserError(f"data file {url!r} is no parquet file, or damaged ({error}); copy it again") from error
