"""Peak memory is a process's own, whoever started it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
MEASURE = "from tasks.peak_memory import peak_resident_bytes; print(peak_resident_bytes())"
SPAWN = f"""
import subprocess, sys
ballast = bytearray(400 << 20)
ballast[::4096] = b"x" * len(ballast[::4096])
print(subprocess.run([sys.executable, "-c", {MEASURE!r}], capture_output=True, text=True, check=True).stdout)
"""
ALLOCATE = f"""
ballast = bytearray(200 << 20)
ballast[::4096] = b"x" * len(ballast[::4096])
del ballast
{MEASURE}
"""


def measured(code: str) -> int:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_peak_of_a_child_is_not_that_of_its_large_parent() -> None:
    assert measured(SPAWN) < 100 << 20


def test_peak_counts_what_was_given_back() -> None:
    assert measured(ALLOCATE) > 200 << 20
