"""Hostile pickles cost no more time and memory than their length allows."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tasks.checkpoints.inert_pickle import read_pickle
from tasks.checkpoints.safetensors_header import CheckpointError

SLOW_SECONDS = 10.0
"""For a file of some MiB; it takes about one."""


def read(data: bytes) -> Any:
    return read_pickle(data, frozenset({"collections.OrderedDict"}), "x")


MANY = 1_000_000
RECORD = b"ccollections\nOrderedDict\n)R"
NESTED = {
    "lists": b"]" * MANY + b"a" * (MANY - 1),
    "tuples": b")" + b"\x85" * MANY,
    "dicts": b"}" * MANY,
    "marks": b"(" * MANY + b"t" * MANY,
    "states": RECORD * 10_000 + b"b" * 9_999,
    "persistent ids": b"N" + b"Q" * MANY,
    "memo": b"N" + b"\x94" * MANY,
    "one long key again and again": b"(" + b"K\x01" * MANY + b"tq\x000}" + b"h\x00Ns" * 1000,
    "one deep key": b"})" + b"\x85" * MANY + b"Ns",
    "appended one by one": b"]" + b"Na" * MANY,
    "appended to a record": RECORD + b"Na" * MANY,
}


@pytest.mark.parametrize("kind", NESTED)
def test_read_pickle_of_a_million_levels_costs_little(kind: str) -> None:
    started = time.monotonic()
    with contextlib.suppress(CheckpointError):
        read(b"\x80\x02" + NESTED[kind] + b".")
    assert time.monotonic() - started < SLOW_SECONDS


def test_read_pickle_of_shared_values_does_not_copy_them() -> None:
    # Copied, compared or printed, it would be 2**100 items.
    body = b"".join(b"h" + bytes([n]) + b"\x86\x94" for n in range(100))
    assert len(read(b"\x80\x04]\x94" + body + b".")) == 2


def test_read_pickle_memory_is_bounded_by_the_length_of_the_file() -> None:
    # In a process of its own: 8 MiB of the opcodes that make most of a byte, in at most 80 bytes for each.
    code = """
import sys
from tasks.checkpoints.inert_pickle import read_pickle
from tasks.peak_memory import peak_resident_bytes
before = peak_resident_bytes()
body = b"N" + eval(sys.argv[1]) * (8 << 20)
try:
    read_pickle(b"\\x80\\x02" + body + b"(t.", frozenset(), "x")
except Exception as error:
    assert type(error).__name__ == "CheckpointError", error
print((peak_resident_bytes() - before) / len(body))
"""
    for opcode in (b"}", b"]", b"(", b"\x85"):
        done = subprocess.run(
            [sys.executable, "-c", code, repr(opcode)],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parents[3],
        )
        assert float(done.stdout) < 80 + 10  # and the file itself, twice
