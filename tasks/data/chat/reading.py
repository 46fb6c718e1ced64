"""Read the rows of chat files: JSON lines, plain or compressed, and parquet."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from configs.data import SIGNATURES_SOURCE, DataConfig
from configs.errors import UserError
from tasks.data.chat.signatures import signature_rows
from tasks.data.documents import MAX_DOCUMENT_BYTES, open_parquet, open_text
from tasks.data.sources import find_sources

_FIELDS = ("messages", "prompt", "completion")
_ROWS = 256
"""Parquet rows turned into Python values at a time."""


def read_rows(sources: tuple[str, ...], data: DataConfig, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row of ``sources`` with its place (file and line or row), files sorted; ``key`` names the sources in messages.

    A name that ends with ``.parquet`` is parquet, all else is JSON lines. Raises :class:`configs.errors.UserError` for
    sources that are not there, damaged files and lines that are no JSON object.
    """
    if SIGNATURES_SOURCE in sources:
        yield from signature_rows()
    files = [source for source in sources if source != SIGNATURES_SOURCE]
    for _, url in find_sources(files, data, key).texts:
        yield from _parquet_rows(url, data.split_field) if url.endswith(".parquet") else _line_rows(url)


def _line_rows(url: str) -> Iterator[tuple[str, dict[str, Any]]]:
    with open_text(url) as file:
        number = 0
        while line := file.readline(MAX_DOCUMENT_BYTES + 1):
            number += 1
            place = f"{url}, line {number}"
            if len(line) > MAX_DOCUMENT_BYTES:
                raise UserError(f"{place}: longer than {MAX_DOCUMENT_BYTES >> 20} MiB; is this one row a line?")
            if not line.isspace():
                yield place, _json_object(line, place)


def _json_object(line: bytes, place: str) -> dict[str, Any]:
    try:
        value = json.loads(line.removeprefix(b"\xef\xbb\xbf"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: is no JSON ({error}); data.format=chat reads one JSON object a line") from None
    if not isinstance(value, dict):
        raise UserError(f"{place}: holds {type(value).__name__}; data.format=chat reads one JSON object a line")
    return value


def _parquet_rows(url: str, split_field: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    with open_parquet(url) as file:
        names = [name for name in (*_FIELDS, split_field) if name in file.schema_arrow.names]
        if not set(names) & set(_FIELDS):
            raise UserError(
                f"{url}: no column {' or '.join(map(repr, _FIELDS))}; columns: {', '.join(file.schema_arrow.names[:20])}"
            )
        number = 0
        for batch in file.iter_batches(batch_size=_ROWS, columns=names):
            for row in batch.to_pylist():
                number += 1
                yield f"{url}, row {number}", row
