"""Peak memory of a merge process depends neither on the number of inputs nor on their size."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.checkpoints import SHAPE, write_checkpoints

SMALL = dataclasses.replace(SHAPE, num_layers=1, vocab_size=4_000)
ALLOWANCE = 1.1


@pytest.mark.slow
def test_merge_memory_is_flat_in_inputs_and_size(pma: Callable[..., Any], tmp_path: Path) -> None:
    small = write_checkpoints(tmp_path / "small", 12, SMALL)
    large = write_checkpoints(tmp_path / "large", 3, dataclasses.replace(SMALL, num_layers=8))
    peaks = []
    for number, urls in enumerate((small[:3], small, large)):
        answer = pma("merge", "--json", "--workers", "1", "--output", str(tmp_path / f"out{number}"), "--inputs", *urls)
        assert answer.code == 0, answer.stderr
        peaks.append(answer.json["peak_memory_bytes"])
    assert max(peaks) <= ALLOWANCE * min(peaks), peaks
    assert max(peaks) < 1 << 30
