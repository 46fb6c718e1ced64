"""The demo's fine-tuning corpus: what its rows are of, and that they are the same every time."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from configs.load import load_config
from tasks.data.chat.messages import parse_row
from tasks.data.chat.rows import read_chat_rows
from tasks.data.chat.signatures import signature_rows
from tasks.data.corpus import is_held_out
from tasks.data.package_files import stdlib_files
from tests.gloo_ranks import ROOT


@pytest.fixture(scope="module")
def rows() -> list[tuple[str, dict[str, str]]]:
    return list(signature_rows())


def test_rows_say_module_docstring_and_signature(rows: list[tuple[str, dict[str, str]]]) -> None:
    import json.decoder

    (found,) = [row for _, row in rows if row["module"] == "json.decoder" and "raw_decode" in row["completion"]]
    paragraph = str(json.decoder.JSONDecoder.raw_decode.__doc__).split("\n\n")[0]
    assert found == {
        "prompt": f"json.decoder\n{' '.join(paragraph.split())}",
        "completion": "def raw_decode(self, s, idx=0):",
        "module": "json.decoder",
        "file": "json/decoder.py",
    }


def test_completions_are_def_lines_of_the_places_that_rows_name(rows: list[tuple[str, dict[str, str]]]) -> None:
    assert len(rows) > 5000
    for place, row in rows[::50]:
        path, _, line = place.rpartition(", line ")
        assert Path(path).as_posix().endswith(row["file"])
        name = row["completion"].removeprefix("async ").removeprefix("def ").partition("(")[0]
        assert f"def {name}" in Path(path).read_text(encoding="utf-8").splitlines()[int(line) - 1]
    for _, row in rows:
        ast.parse(f"{row['completion']} pass")
        assert "\n" not in row["completion"]
        parse_row(row)


def test_every_documented_function_of_a_module_is_there_once(rows: list[tuple[str, dict[str, str]]]) -> None:
    source = Path(dict(stdlib_files())["argparse.py"]).read_text()
    expected = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef) and ast.get_docstring(n)]
    mine = [row["completion"] for _, row in rows if row["file"] == "argparse.py"]
    assert {line.removeprefix("def ").partition("(")[0] for line in mine} == {function.name for function in expected}
    texts = [json.dumps(row) for _, row in rows]
    assert len(set(texts)) == len(texts)


def test_builder_writes_the_same_rows_in_another_process(rows: list[tuple[str, dict[str, str]]]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tasks.data.chat.signatures"], cwd=ROOT, capture_output=True, check=True, text=True
    )
    assert [json.loads(line) for line in done.stdout.splitlines()] == [row for _, row in rows]


def test_rows_that_sft_tiny_holds_out_are_of_files_that_tiny_holds_out(rows: list[tuple[str, dict[str, str]]]) -> None:
    tiny, chat = load_config("tiny").config, load_config("sft-tiny").config
    assert chat.model == tiny.model
    found = read_chat_rows(chat.data.sources, chat, "held_out", key="data.sources")
    texts = [bytes(found.tokens[a:b]).decode() for a, b in zip(found.starts[:-1], found.starts[1:], strict=True)]
    unseen = {row["module"] for _, row in rows if is_held_out(row["file"], tiny.data.held_out_fraction)}
    assert {text.split("\n")[1] for text in texts} <= unseen
    assert len(texts) > 300
