"""Build the tasks that ship for byte-level models of Python: multiple choice from held-out files of the standard library.

``python -m tasks.evaluation.stdlib_tasks FOLDER`` writes ``brackets.jsonl``, ``typos.jsonl`` and ``words.jsonl``; the YAML
beside the shipped ones says how lm-evaluation-harness asks them. A row is ``{"text", "choices", "answer", "place"}``: the text
before, what may follow, the place of what does follow, and where it was found.

Files are those that any run with ``data.sources=[python://stdlib]`` and ``data.held_out_fraction`` of at least
:data:`HELD_OUT_FRACTION` holds out. Everything is drawn from hashes of place and text: one library gives one set of rows, on any
machine.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import re
import tokenize
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from blake3 import blake3

from configs.data import STDLIB_SOURCE, DataConfig
from tasks.data.corpus import is_held_out
from tasks.data.sources import find_sources

HELD_OUT_FRACTION = 0.05
"""The default of ``data.held_out_fraction``; what it holds out, larger fractions hold out too."""
TEXT_BYTES = 88
"""Most text before the choices; with the longest choice it fits a sequence of 128."""
CHOICE_BYTES = 39
ROWS = 240
"""Rows of a task."""
CLOSING = (")", "]")
_WORD = re.compile(r"[A-Za-z]{5,}")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One question."""

    text: str
    """What stands before."""
    choices: tuple[str, ...]
    """What may follow, one of them rightly."""
    answer: int
    """Place of that one."""
    place: str
    """File below the library, and line."""


def held_out_files() -> list[tuple[str, str]]:
    """(path below the library, text) of the held-out files of this interpreter's library that are ASCII."""
    found = find_sources([STDLIB_SOURCE], DataConfig(), "data.sources").texts
    texts = [(name, Path(url).read_bytes()) for name, url in found if is_held_out(name, HELD_OUT_FRACTION)]
    return [(name, data.decode()) for name, data in texts if data.isascii()]


def bracket_rows(files: Sequence[tuple[str, str]]) -> Iterator[Row]:
    """Which bracket closes what is open: the text ends before a closing one of code, of which the opening one is in sight.

    Each of the two is the answer equally often, so that guessing scores a half. Braces are too rare in these files.
    """
    found: dict[str, list[Row]] = {closing: [] for closing in CLOSING}
    for name, source in files:
        starts = _line_starts(source)
        opened: list[int] = []
        for kind, text, (line, column), _, _ in tokenize.generate_tokens(io.StringIO(source).readline):
            at = starts[line - 1] + column
            if kind != tokenize.OP or text not in "([{)]}":
                continue
            if text in "([{":
                opened.append(at)
                continue
            start, before = opened.pop(), _before(source, at)
            # Something stands between them, so that "()" is no answer.
            if text in CLOSING and 1 < at - start <= len(before):
                place = f"{name}:{line}"
                found[text].append(Row(text=before, choices=CLOSING, answer=CLOSING.index(text), place=place))
    drawn = [_draw(rows, ROWS // len(CLOSING)) for rows in found.values()]
    for rows in drawn:
        yield from rows[: min(map(len, drawn))]


def typo_rows(files: Sequence[tuple[str, str]]) -> Iterator[Row]:
    """Which line is spelt rightly: the one that follows, or the same with two neighbouring letters of a word exchanged."""
    rows = []
    for name, number, text, line in _lines(files):
        swaps = [
            line[:i] + line[i + 1] + line[i] + line[i + 2 :]
            for word in _WORD.finditer(line)
            for i in range(word.start() + 1, word.end() - 1)
            if line[i] != line[i + 1]
        ]
        if swaps:
            wrong = swaps[_number(f"typo/{name}:{number}") % len(swaps)]
            rows.append(_either(text, line, wrong, f"{name}:{number}"))
    yield from _draw(rows, ROWS)


def word_rows(files: Sequence[tuple[str, str]]) -> Iterator[Row]:
    """How a word goes on: the text ends after its first two letters; the other ending is of a word as long, and as often met."""
    words = [(name, source, word) for name, source in files for word in _WORD.finditer(source)]
    alike: dict[tuple[str, int], list[tuple[str, str]]] = {}
    for name, _, word in words:
        alike.setdefault((word[0][:2], len(word[0])), []).append((name, word[0]))
    rows = []
    for name, source, word in words:
        cut = word.start() + 2
        before, place = _before(source, cut), f"{name}:{source.count(chr(10), 0, cut) + 1}"
        others = [w for file, w in alike[word[0][:2], len(word[0])] if file != name and w != word[0]]
        # Not a word that stands in the text already: that would be a question of copying.
        if others and len(before) > 40 and word[0] not in before:
            wrong = others[_number(f"other/{place}/{word[0]}") % len(others)]
            rows.append(_either(before, word[0][2:], wrong[2:], place))
    yield from _draw(rows, ROWS)


TASKS: dict[str, Callable[[Sequence[tuple[str, str]]], Iterator[Row]]] = {
    "brackets": bracket_rows,
    "typos": typo_rows,
    "words": word_rows,
}


def write_tasks(folder: Path, files: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Write ``<name>.jsonl`` of every task into ``folder``; rows of each."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = {}
    for name, build in TASKS.items():
        rows = list(build(files))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
        counts[name] = len(rows)
    return counts


def _lines(files: Sequence[tuple[str, str]]) -> Iterator[tuple[str, int, str, str]]:
    """File, number, text before, and the line itself, of lines that say something and follow one that does."""
    for name, source in files:
        lines = source.splitlines(keepends=True)
        for number, (before, line) in enumerate(itertools.pairwise(lines), 2):
            short = 12 <= len(line) <= CHOICE_BYTES and line.endswith("\n")
            if short and before.strip() and _WORD.search(line):
                yield name, number, _before(source, sum(map(len, lines[: number - 1]))), line


def _before(source: str, end: int) -> str:
    """What stands before ``end``: whole lines as far as they fit, so that a text begins as a line does."""
    text = source[max(0, end - TEXT_BYTES) : end]
    first = text.find("\n") + 1
    return text[first:] if end > TEXT_BYTES and 0 < first < len(text) else text


def _either(text: str, right: str, wrong: str, place: str) -> Row:
    answer = _number(f"order/{place}") % 2
    return Row(text=text, choices=(wrong, right) if answer else (right, wrong), answer=answer, place=place)


def _draw(rows: Sequence[Row], count: int) -> list[Row]:
    """``count`` rows by hash, in the order in which they were found; equal questions are asked once."""
    rows = list({(row.text, row.choices): row for row in rows}.values())
    chosen = sorted(range(len(rows)), key=lambda i: _number(f"{rows[i].place}/{rows[i].text}"))[:count]
    return [rows[i] for i in sorted(chosen)]


def _number(text: str) -> int:
    return int.from_bytes(blake3(text.encode()).digest(8), "big")


def _line_starts(source: str) -> list[int]:
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    return starts


def main() -> None:
    """Write the tasks of this interpreter's library."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    write_tasks(parser.parse_args().folder, held_out_files())


if __name__ == "__main__":
    main()
