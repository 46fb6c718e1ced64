"""Merges that are killed at random times end in the bytes of one that was not; the benchmark of the same name kills fifty times."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest

from benchmarks.checkpoints import SHAPE, write_checkpoints
from benchmarks.kills import kill_merges

KILLS = 8
INPUTS = 6


@pytest.mark.slow
def test_merge_killed_at_random_times_ends_in_the_same_bytes(tmp_path: Path) -> None:
    model = dataclasses.replace(SHAPE, num_layers=4, vocab_size=8_000)
    urls = write_checkpoints(tmp_path, INPUTS, model)
    tally = kill_merges(urls, tmp_path, KILLS, random.Random(7), workers=("local", "2"))
    assert sum(tally.kills.values()) == KILLS
    assert {victim.split()[0] for victim in tally.kills} <= {"driver", "worker"}
    assert tally.merges >= 2
