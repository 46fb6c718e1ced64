from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from blake3 import blake3
from bpe_tokenizer import TEXT, train_bpe
from faulty_store import FaultyStore
from tokenizers import Tokenizer

from cluster.errors import StorageError
from cluster.storage import Store, open_store
from configs.errors import UserError
from pipelines import tokenize as story
from pipelines.tokenize import tokenize
from tasks.data.documents import DocumentOptions
from tasks.data.token_files import open_tokens

ROOT = Path(__file__).parent.parent.parent
GENERATOR = np.random.default_rng(11)
SMALL = {"shard_tokens": 600, "unit_bytes": 3000}


def quiet(line: str) -> None:
    assert line.startswith("tokenize: ")


def some_documents(count: int) -> list[str]:
    return ["".join(TEXT[GENERATOR.integers(3)] for _ in range(GENERATOR.integers(1, 6))) for _ in range(count)]


def write_sources(folder: Path) -> list[str]:
    """Every format, with documents that are left out; returns the texts in reading order."""
    folder.mkdir()
    texts = some_documents(150)
    lines = [json.dumps({"text": text}) for text in texts[:60]]
    (folder / "a.jsonl").write_text("\n".join([*lines[:30], '{"text": ""}', *lines[30:]]) + "\n")
    (folder / "b.jsonl.gz").write_bytes(
        gzip.compress("".join(json.dumps({"text": t}) + "\n" for t in texts[60:90]).encode())
    )
    pq.write_table(pa.table({"text": [*texts[90:140], None]}), folder / "c.parquet", row_group_size=7)
    for number, text in enumerate(texts[140:]):
        (folder / f"d{number:02d}.txt").write_text(text)
    return texts


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def sources(tmp_path: Path) -> tuple[str, list[str]]:
    texts = write_sources(tmp_path / "text")
    return str(tmp_path / "text"), texts


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    train_bpe(tmp_path / "tokenizer.json")
    return str(tmp_path / "tokenizer.json")


def test_row_is_the_documents_in_order(tmp_path: Path, sources: tuple[str, list[str]], tokenizer: str) -> None:
    lines: list[str] = []
    done = tokenize([sources[0]], str(tmp_path / "out"), tokenizer=tokenizer, report=lines.append, **SMALL)
    library = Tokenizer.from_file(tokenizer)
    end = library.token_to_id("<|endoftext|>")
    expected = [token for text in sources[1] for token in [*library.encode(text).ids, end]]
    reader = open_tokens(done["output"])
    assert reader.read(0, len(reader)).tolist() == expected
    assert done["tokens"] == len(expected)
    assert (done["documents"], done["empty_documents"], done["malformed_documents"]) == (150, 2, 0)
    assert done["dtype"] == "uint16"
    assert done["shards"] > 5
    assert done["bytes_read"] == sum(path.stat().st_size for path in Path(sources[0]).iterdir())
    assert done["bytes_written"] == sum(path.stat().st_size for path in (tmp_path / "out").glob("tokens-*"))
    assert len(lines) > 3
    assert lines[-1].startswith(f"tokenize: unit {len(lines)} of {len(lines)}, ")


def test_manifest_says_what_stands_there(tmp_path: Path, sources: tuple[str, list[str]], tokenizer: str) -> None:
    done = tokenize([sources[0]], str(tmp_path / "out"), tokenizer=tokenizer, report=quiet, **SMALL)
    found = tree(tmp_path / "out")
    manifest = json.loads(found["manifest.json"])
    assert json.loads(found["plan.json"]) == manifest["plan"]
    assert found["tokenizer.json"] == Path(tokenizer).read_bytes()
    listed = {"manifest.json", "plan.json", "tokenizer.json"}
    for shard in manifest["shards"]:
        index_key = shard["key"].replace(".bin", ".idx")
        for key, size, digest in ((shard["key"], "bytes", "digest"), (index_key, "index_bytes", "index_digest")):
            assert len(found[key]) == shard[size]
            assert blake3(found[key]).hexdigest() == shard[digest]
            listed.add(key)
        assert shard["tokens"] * 2 == shard["bytes"]
        assert shard["tokens"] <= SMALL["shard_tokens"] or shard["documents"] == 1
        megatron = open_tokens(str(tmp_path / "out" / shard["key"]))
        assert len(megatron) == shard["tokens"]
    assert listed == found.keys()
    assert manifest["digest"] == done["digest"]
    assert [Path(file["url"]).name for file in manifest["plan"]["sources"]] == sorted(
        path.name for path in Path(sources[0]).iterdir()
    )
    assert all(file["bytes"] == Path(file["url"]).stat().st_size for file in manifest["plan"]["sources"])


def test_documents_longer_than_a_shard_stand_alone(tmp_path: Path) -> None:
    texts = ["a" * 5, "b" * 50, "c" * 5, "d" * 3, "e"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenize([str(tmp_path / "a.jsonl")], str(tmp_path / "out"), shard_tokens=10, report=quiet)
    shards = [path.read_bytes() for path in sorted((tmp_path / "out").glob("*.bin"))]
    assert shards == [b"a" * 5 + b"\0", b"b" * 50 + b"\0", b"ccccc\0ddd\0", b"e\0"]


def test_workers_do_not_change_a_byte(tmp_path: Path, sources: tuple[str, list[str]], tokenizer: str) -> None:
    one, three = tmp_path / "one", tmp_path / "three"
    first = tokenize([sources[0]], str(one), tokenizer=tokenizer, workers=1, report=quiet, **SMALL)
    second = tokenize([sources[0]], str(three), tokenizer=tokenizer, workers=3, report=quiet, **SMALL)
    assert tree(one) == tree(three)
    own = {"output", "seconds"}
    assert {k: v for k, v in first.items() if k not in own} == {k: v for k, v in second.items() if k not in own}


def test_the_same_again_is_success_without_work(tmp_path: Path, sources: tuple[str, list[str]]) -> None:
    out = tmp_path / "out"
    first = tokenize([sources[0]], str(out), report=quiet, **SMALL)
    before, times = tree(out), {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    second = tokenize([sources[0]], str(out), report=quiet, workers=2, **SMALL)
    assert (second["bytes_read"], second["bytes_written"]) == (0, 0)
    for key in ("tokens", "documents", "empty_documents", "shards", "digest"):
        assert second[key] == first[key]
    assert tree(out) == before
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == times


def changes(folder: Path, tokenizer: str) -> dict[str, dict[str, Any]]:
    return {
        "tokenizer": {"tokenizer": tokenizer},
        "shard_tokens": {"shard_tokens": 601},
        "options": {"options": DocumentOptions(txt_documents="line")},
        "sources": {"sources": [str(folder / "a.jsonl")]},
    }


@pytest.mark.parametrize("change", ["tokenizer", "shard_tokens", "options", "sources", "touched source"])
@pytest.mark.parametrize("finished", [True, False])
def test_other_content_in_the_output_is_refused(
    tmp_path: Path, sources: tuple[str, list[str]], tokenizer: str, change: str, finished: bool
) -> None:
    out = tmp_path / "out"
    tokenize([sources[0]], str(out), report=quiet, **SMALL)
    if not finished:
        (out / "manifest.json").unlink()
    if change == "touched source":
        path = Path(sources[0]) / "d00.txt"
        path.write_bytes(path.read_bytes()[::-1])
    asked = {"sources": [sources[0]], **SMALL, **changes(Path(sources[0]), tokenizer).get(change, {})}
    before = tree(out)
    with pytest.raises(
        UserError, match=f"another tokenization .*{change.removeprefix('touched ')}.*nothing was touched"
    ):
        tokenize(asked.pop("sources"), str(out), report=quiet, **asked)
    assert tree(out) == before


def test_a_folder_of_something_else_is_refused(tmp_path: Path, sources: tuple[str, list[str]]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"not empty \(it holds thesis\.txt"):
        tokenize([sources[0]], str(out), report=quiet)
    assert tree(out) == {"thesis.txt": b"mine"}
    (out / "manifest.json").write_text('{"kind": "training"}')
    with pytest.raises(UserError, match="is no manifest of token files"):
        tokenize([sources[0]], str(out), report=quiet)


class Killed:
    """Fails the call of a given number on storage, and all after it, as a process that is gone does."""

    def __init__(self, at: int) -> None:
        self.at, self.calls = at, 0

    def __call__(self, *_: str) -> bool:
        self.calls += 1
        return self.calls > self.at


def open_faulty(fail: Callable[[str, str], bool]) -> Callable[[str], Store]:
    return lambda url: FaultyStore(open_store(url), fail)


def test_killed_at_any_storage_call_and_repeated_gives_the_same_bytes(
    tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sources(tmp_path / "text")
    asked: dict[str, Any] = {"tokenizer": tokenizer, "report": quiet, "shard_tokens": 3000, "unit_bytes": 12000}
    tokenize([str(tmp_path / "text")], str(tmp_path / "clean"), **asked)
    clean = tree(tmp_path / "clean")
    killed_at = 0
    while True:
        out, kill = tmp_path / f"out{killed_at}", Killed(killed_at)
        monkeypatch.setattr(story, "open_store", open_faulty(kill))
        try:
            tokenize([str(tmp_path / "text")], str(out), **asked)
        except StorageError:
            assert "manifest.json" not in tree(out) or tree(out)["manifest.json"] == clean["manifest.json"]
        else:
            break
        monkeypatch.setattr(story, "open_store", open_store)
        tokenize([str(tmp_path / "text")], str(out), **asked)
        left = {key: data for key, data in tree(out).items() if not key.startswith("receipts/")}
        assert left == clean, f"killed at call {killed_at}"
        killed_at += 1
    assert killed_at > 30


def test_killed_again_and_again_it_goes_on_where_it_stood(
    tmp_path: Path, sources: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenize([sources[0]], str(tmp_path / "clean"), report=quiet, **SMALL)
    clean, out = tree(tmp_path / "clean"), tmp_path / "out"
    streamed: list[str] = []

    def fail(method: str, key: str) -> bool:
        """The third shard of every life is its last."""
        if method == "complete":
            streamed.append(key)
            return len(streamed) % 3 == 0
        return False

    monkeypatch.setattr(story, "open_store", open_faulty(fail))
    lives = 1
    while True:
        try:
            done = tokenize([sources[0]], str(out), report=quiet, **SMALL)
            break
        except StorageError:
            lives += 1
    assert tree(out) == clean
    # Every shard was written once, but for the one that each life ended in.
    assert len(streamed) == done["shards"] + lives - 1
    assert lives > 3


def test_killed_with_workers_and_repeated_gives_the_same_bytes(tmp_path: Path, tokenizer: str) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for name in "abcdef":
        (text / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in some_documents(4000)))
    sizes = {"shard_tokens": 20_000, "unit_bytes": 400_000}
    tokenize([str(text)], str(tmp_path / "clean"), tokenizer=tokenizer, report=quiet, **sizes)
    out = tmp_path / "out"
    program = (
        "from pipelines.tokenize import tokenize\n"
        "if __name__ == '__main__':\n"
        f"    tokenize([{str(text)!r}], {str(out)!r}, tokenizer={tokenizer!r}, workers=2, **{sizes!r})\n"
    )
    (tmp_path / "program.py").write_text(program)
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        while len(list(out.glob("receipts/*"))) < 5:
            assert process.poll() is None, "it ended before it was killed"
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
    assert not (out / "manifest.json").exists()
    again = tokenize([str(text)], str(out), tokenizer=tokenizer, workers=2, report=quiet, **sizes)
    assert again["bytes_written"] < sum(path.stat().st_size for path in out.glob("tokens-*"))
    left = {key: data for key, data in tree(out).items() if not key.endswith(".part")}
    assert left == tree(tmp_path / "clean")


def test_two_drivers_at_once_both_succeed(tmp_path: Path, sources: tuple[str, list[str]]) -> None:
    tokenize([sources[0]], str(tmp_path / "clean"), report=quiet, **SMALL)
    with ThreadPoolExecutor(3) as pool:
        drivers = [pool.submit(tokenize, [sources[0]], str(tmp_path / "out"), report=quiet, **SMALL) for _ in range(3)]
        assert len({driver.result()["digest"] for driver in drivers}) == 1
    left = {key: data for key, data in tree(tmp_path / "out").items() if not key.startswith("receipts/")}
    assert left == tree(tmp_path / "clean")


def test_a_shard_of_other_bytes_is_not_overwritten(
    tmp_path: Path, sources: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(story, "open_store", open_faulty(lambda method, key: method == "create" and key != "plan.json"))
    with pytest.raises(StorageError):
        tokenize([sources[0]], str(out), report=quiet, **SMALL)
    monkeypatch.setattr(story, "open_store", open_store)
    (shard,) = out.glob("*.bin")
    for damage in (shard.read_bytes()[:-1], shard.read_bytes()[:-1] + b"x"):
        shard.write_bytes(damage)
        with pytest.raises(UserError, match=r"00000\.bin holds other bytes"):
            tokenize([sources[0]], str(out), report=quiet, **SMALL)
        assert shard.read_bytes() == damage


def test_sources_that_change_while_they_are_read_are_not_committed(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for name in ("a", "b"):
        (tmp_path / "text" / f"{name}.txt").write_text(name * 100)

    def touch(line: str) -> None:
        (tmp_path / "text" / "a.txt").write_text("other")

    with pytest.raises(UserError, match="changed while they were read"):
        tokenize([str(tmp_path / "text")], str(tmp_path / "out"), unit_bytes=100, report=touch)
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_malformed_documents_are_named_or_counted(tmp_path: Path, workers: int) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two\\u0000"}\n{"text": 3}\n\n{"text": "four"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: it holds a zero byte.*skip malformed"):
        tokenize([str(tmp_path / "a.jsonl")], str(tmp_path / "refused"), workers=workers, report=quiet)
    done = tokenize(
        [str(tmp_path / "a.jsonl")],
        str(tmp_path / "out"),
        options=DocumentOptions(malformed="skip"),
        workers=workers,
        report=quiet,
    )
    assert (done["documents"], done["malformed_documents"]) == (2, 2)
    assert (tmp_path / "out" / "tokens-00000-00000.bin").read_bytes() == b"one\0four\0"


def test_sources_without_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(UserError, match="no document with text"):
        tokenize([str(tmp_path / "a.jsonl")], str(tmp_path / "out"), report=quiet)


def test_sources_are_checked_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    out = tmp_path / "out"
    for wrong, message in (
        ([], "no sources"),
        ([str(tmp_path / "none")], "holds no files"),
        ([str(tmp_path), str(tmp_path / "*.txt")], "named twice"),
        (["ftp2://x/y"], "cannot be listed"),
    ):
        with pytest.raises(UserError, match=message):
            tokenize(wrong, str(out), report=quiet)
    for number in ("shard_tokens", "unit_bytes", "workers"):
        with pytest.raises(UserError, match=f"{number} is 0"):
            tokenize([str(tmp_path)], str(out), report=quiet, **{number: 0})
    with pytest.raises(UserError, match="lives in one process"):
        tokenize([str(tmp_path)], "memory://out", report=quiet, workers=2)
    assert not out.exists()
    tokenize([str(tmp_path / "a.txt")], str(out), report=quiet)
    with pytest.raises(UserError, match="lies in the output"):
        tokenize([str(tmp_path)], str(out), report=quiet)


def test_s3_sources_and_output(
    tmp_path: Path, s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, tokenizer: str
) -> None:
    for name, value in s3_environment.items():
        monkeypatch.setenv(name, value)
    write_sources(tmp_path / "text")
    root = open_store("s3://runs/tokenize")
    for name, data in tree(tmp_path / "text").items():
        root.put(f"text/{name}", data)
    asked: dict[str, Any] = {"tokenizer": tokenizer, "report": quiet, "shard_tokens": 3000, "unit_bytes": 20000}
    local = tokenize([str(tmp_path / "text")], str(tmp_path / "out"), **asked)
    done = tokenize(["s3://runs/tokenize/text"], "s3://runs/tokenize/out", workers=2, **asked)
    assert done["digest"] == local["digest"]
    row, expected = open_tokens("s3://runs/tokenize/out"), open_tokens(str(tmp_path / "out"))
    assert np.array_equal(row.read(1000, 5000), expected.read(1000, 5000))
    again = tokenize(["s3://runs/tokenize/text"], "s3://runs/tokenize/out", workers=2, **asked)
    assert again["bytes_read"] == 0
