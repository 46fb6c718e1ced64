"""Chat files read: every kind of file, the split, long rows, and mistakes by file and line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.errors import ConfigError, UserError
from tasks.data.chat.rows import ChatRows, read_chat_rows
from tasks.data.corpus import Side, is_held_out
from tests.chat_data import chat_config, pairs, train_chat_bpe, turns, write_rows

ROWS = [*pairs(40), *(turns(f"t{n}", f"a{n}", "more", f"b{n}") for n in range(10))]


def read(source: Path | str, *overrides: str, side: Side = "train", **fields: Any) -> ChatRows:
    config = chat_config(source, *overrides, **fields)
    return read_chat_rows(config.data.sources, config, side, key="data.sources")


def texts(rows: ChatRows) -> list[str]:
    """Rows of bytes as text."""
    return [bytes(rows.tokens[a:b]).decode() for a, b in zip(rows.starts[:-1], rows.starts[1:], strict=True)]


def said(row: dict[str, Any]) -> str:
    """What ``plain`` makes of a row."""
    given = row.get("messages") or [
        {"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]},
    ]  # fmt: skip
    parts = [
        f"{message['role'].capitalize()}:\n{message['content']}" + ("\0" if message["role"] == "assistant" else "")
        for message in given
    ]
    return "\n".join(parts)


@pytest.fixture
def both_sides(tmp_path: Path) -> list[str]:
    source = write_rows(tmp_path / "rows.jsonl", ROWS)
    return [text for side in ("train", "held_out") for text in texts(read(source, side=side))]


def test_sides_share_out_the_rows(both_sides: list[str], tmp_path: Path) -> None:
    assert sorted(both_sides) == sorted(said(row) for row in ROWS)
    held_out = texts(read(tmp_path / "rows.jsonl", side="held_out"))
    assert 0 < len(held_out) < len(ROWS) / 2


@pytest.mark.parametrize("kind", ["gz", "zst", "bom", "no suffix", "folder", "parquet", "memory"])
def test_every_kind_of_file_is_read(tmp_path: Path, kind: str) -> None:
    plain = write_rows(tmp_path / "rows.jsonl", ROWS)
    expected = texts(read(plain))
    data = plain.read_bytes()
    folder = tmp_path / "in"
    folder.mkdir()
    source: Path | str = folder / {"gz": "a.jsonl.gz", "zst": "a.jsonl.zst", "parquet": "a.parquet"}.get(kind, "rows")
    if kind == "gz":
        Path(source).write_bytes(gzip.compress(data))
    elif kind == "zst":
        Path(source).write_bytes(pa.Codec("zstd").compress(data, asbytes=True))
    elif kind == "bom":
        Path(source).write_bytes(b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n\n"))
    elif kind == "folder":
        (folder / "1.jsonl").write_bytes(b"".join(data.splitlines(keepends=True)[:20]))
        (folder / "2.json").write_bytes(b"".join(data.splitlines(keepends=True)[20:]))
        source = folder
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist([{"messages": None, "id": 1, **row} for row in ROWS]), source)
    elif kind == "memory":
        import fsspec

        source = "memory://chat-rows/a.jsonl"
        with fsspec.open(source, "wb") as file:
            file.write(data)
    else:
        Path(source).write_bytes(data)
    assert texts(read(source)) == expected


def test_digest_is_of_tokens_and_answers(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", ROWS)
    copied = write_rows(tmp_path / "copy.jsonl", [{**row, "more": 1} for row in ROWS])
    assert read(source).digest == read(copied).digest
    assert read(source).digest != read(source, side="held_out").digest
    source.write_text(source.read_text().replace('"3 ', '"4 '))
    assert read(source).digest != read(copied).digest


# The split


def test_split_field_keeps_what_belongs_together_on_one_side(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", pairs(200))
    sides = {side: texts(read(source, "data.split_field=module", side=side)) for side in ("train", "held_out")}
    by_text = {said(row): row["module"] for row in pairs(200)}
    modules = {side: {by_text[text] for text in found} for side, found in sides.items()}
    assert modules["held_out"] == {f"m{n}" for n in range(17) if is_held_out(f"m{n}", 0.3)}
    assert modules["train"] == {f"m{n}" for n in range(17)} - modules["held_out"]
    assert sum(map(len, sides.values())) == 200


def test_equal_rows_are_on_one_side_whatever_else_they_hold(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [{**row, "id": n} for row in pairs(30) for n in range(3)])
    sides = [texts(read(source, side=side)) for side in ("train", "held_out")]
    assert not set(sides[0]) & set(sides[1])


@pytest.mark.parametrize(("row", "got"), [({}, "None"), ({"module": {"a": 1}}, "{'a': 1}"), ({"module": None}, "None")])
def test_split_field_that_a_row_lacks_is_refused_by_line(tmp_path: Path, row: dict[str, Any], got: str) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [*pairs(3), {"prompt": "q", "completion": "a", **row}])
    with pytest.raises(UserError) as caught:
        read(source, "data.split_field=module")
    assert f"{source}, line 4: data.split_field='module' needs text or a whole number there, got {got}" in str(
        caught.value
    )


# Rows longer than a sequence of 48, and the token after it


def fitting(length: int) -> dict[str, str]:
    """A row of ``length`` bytes: 20 of them the question and the template's."""
    return {"prompt": "q", "completion": "a" * (length - 20)}


def test_row_that_fills_a_sequence_and_the_token_after_fits(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [*pairs(30), fitting(49)])
    assert max(read(source, "data.held_out_fraction=0.01").lengths) == 49


def test_longer_row_is_refused_with_its_line_and_cures(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [*pairs(30), fitting(50)])
    with pytest.raises(UserError) as caught:
        read(source, "data.held_out_fraction=0.01")
    message = str(caught.value)
    assert f"{source}, line 31: 50 tokens are more than training.sequence_length=48" in message
    assert "raise training.sequence_length to 49, or give data.long_rows=truncate (cut the end) or drop" in message
    read(source, "data.held_out_fraction=0.01", length=49)


def test_longer_rows_are_dropped_or_truncated_and_counted_if_asked(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [*pairs(30), fitting(50), fitting(80)])
    dropped = read(source, "data.held_out_fraction=0.01", "data.long_rows=drop")
    assert (dropped.num_dropped, dropped.num_truncated) == (2, 0)
    assert len(dropped.lengths) == len(read(source, "data.held_out_fraction=0.01", length=100).lengths) - 2
    cut = read(source, "data.held_out_fraction=0.01", "data.long_rows=truncate")
    assert (cut.num_dropped, cut.num_truncated) == (0, 2)
    assert cut.lengths[-2:].tolist() == [49, 49]
    assert texts(cut)[-1] == said(fitting(80))[:49]


def test_truncation_that_would_leave_no_answer_is_refused(tmp_path: Path) -> None:
    row = {"prompt": "q" * 30, "completion": "answer"}
    source = write_rows(tmp_path / "rows.jsonl", [*pairs(30), row])
    cut = read(source, "data.held_out_fraction=0.01", "data.long_rows=truncate")
    assert cut.is_answer[cut.starts[-2] :].sum() == 1
    write_rows(source, [*pairs(30), {**row, "prompt": "q" * 31}])
    with pytest.raises(
        UserError, match=r"line 31: .* leave nothing of its answer, which begins at token 49; raise .*drop"
    ):
        read(source, "data.held_out_fraction=0.01", "data.long_rows=truncate")


# Mistakes, on either side of the split


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "is no JSON"),
        ("[1]", "holds list; data.format=chat reads one JSON object a line"),
        ("[", "is no JSON"),
        (json.dumps({"prompt": "q"}), "has no answer"),
        (json.dumps({"prompt": "q", "completion": " "}), "message 2 is an empty answer"),
        (json.dumps(turns("q")), "has no answer"),
        (json.dumps({"messages": [{"role": "bot", "content": "x"}]}), "has the role 'bot'"),
        (json.dumps({"prompt": "q", "completion": "a\0"}), "zero byte"),
        ("\xff", "is no JSON"),
    ],
)
def test_mistake_in_a_row_is_named_by_file_and_line(tmp_path: Path, line: str, expected: str) -> None:
    source = write_rows(tmp_path / "rows.jsonl", pairs(20))
    source.write_bytes(source.read_bytes() + line.encode("latin-1") + b"\n")
    errors = []
    sides: tuple[Side, ...] = ("train", "held_out")
    for side in sides:
        # What takes the tokenizer to judge is found on its own side alone.
        try:
            read(source, "data.held_out_fraction=0.5", side=side)
        except UserError as error:
            errors.append(str(error))
    assert errors
    assert all(f"{source}, line 21: " in error and expected in error for error in errors)


def test_mistake_in_a_parquet_file_is_named_by_row(tmp_path: Path) -> None:
    rows = [*pairs(5), {"prompt": "q", "completion": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet, row 6: has no answer"):
        read(tmp_path / "a.parquet")
    pq.write_table(pa.Table.from_pylist([{"text": "x"}]), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b.parquet: no column 'messages' or 'prompt' or 'completion'; columns: text"):
        read(tmp_path / "b.parquet")


def test_token_beyond_the_model_is_named_by_line(tmp_path: Path) -> None:
    bpe = train_chat_bpe(tmp_path)
    source = write_rows(tmp_path / "rows.jsonl", pairs(20))
    overrides = (f"data.tokenizer={tmp_path}", "data.chat_template=chatml", "data.held_out_fraction=0.01")
    read(source, *overrides, vocab_size=bpe.get_vocab_size())
    with pytest.raises(UserError, match=r"line 1: token id \d+ is not below model.vocab_size=200; raise it"):
        read(source, *overrides, vocab_size=200)


def test_side_without_rows_is_refused(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", pairs(3))
    with pytest.raises(
        UserError, match=r"data.sources leave no held-out row at data.held_out_fraction=0.001; give more"
    ):
        read(source, "data.held_out_fraction=0.001", side="held_out")
    with pytest.raises(UserError, match=r"leave no train row at .*, 3 being too long"):
        read(source, "data.held_out_fraction=0.001", "data.long_rows=drop", length=8)


# Configuration


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ("data.format=auto",),
            "data.chat_template='plain' is not possible; allowed: leave it out without data.format=chat",
        ),
        (("data.format=auto", "data.chat_template=null", "data.long_rows=drop"), "data.long_rows='drop'"),
        (("data.format=auto", "data.chat_template=null", "data.split_field=x"), "data.split_field='x'"),
        (("data.sources=[python://stdlib]",), "files of chat rows, or python://stdlib-signatures"),
        (
            ("data.format=auto", "data.chat_template=null", "data.sources=[python://stdlib-signatures]"),
            "allowed: data.format=chat with it",
        ),
        (("data.long_rows=cut",), "data.long_rows"),
        (("data.split_field=''",), "data.split_field=''"),
        (("data.chat_template=s3://key:secret@b/t.jinja",), "credentials"),
    ],
)
def test_impossible_settings_are_refused_by_key(overrides: tuple[str, ...], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        chat_config("rows.jsonl", *overrides)
    assert expected in str(caught.value)
    assert "secret" not in str(caught.value)
