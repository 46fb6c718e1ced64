"""Gangs as large as fits: fewer ranks after a loss, more once there is room."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.storage import open_store
from configs.errors import ConfigError
from configs.load import load_config
from configs.schema import Config
from pipelines.elastic import LOOK_SECONDS, GrowthWatch, largest_size
from tasks.checkpoints.run_folder import RunFolder

ROOT = Path(__file__).parents[2]


def config_for(*, workers: int, least: int | None, **training: int) -> Config:
    """The demo's configuration, 16 sequences a batch and 8 experts, on up to ``workers`` ranks."""
    config = load_config("tiny", ()).config
    return replace(config, training=replace(config.training, num_workers=workers, min_workers=least, **training))


@pytest.mark.parametrize(("slots", "size"), [(40, 8), (8, 8), (7, 4), (4, 4), (3, 2), (2, 2), (1, None), (0, None)])
def test_largest_size_divides_the_batch(slots: int, size: int | None) -> None:
    assert largest_size(config_for(workers=8, least=2), slots) == size


def test_largest_size_keeps_the_expert_parallel_degree() -> None:
    config = config_for(workers=8, least=2, expert_parallel=4)
    assert [largest_size(config, slots) for slots in (8, 7, 4, 3)] == [8, 4, 4, None]


def test_min_workers_beyond_num_workers_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"training.min_workers=3 is not possible; .*between 1 and training.num_workers=2"
    ):
        load_config("tiny", ("training.min_workers=3",))


def test_growth_is_asked_for_once_and_only_where_there_is_room(tmp_path: Path) -> None:
    store, now, room = open_store(str(tmp_path)), [0.0], [2]
    watch = GrowthWatch(
        config_for(workers=8, least=2), store, "requests/a.json", 2, slots=lambda _: room[0], clock=lambda: now[0]
    )
    watch.look()
    now[0] += LOOK_SECONDS
    watch.look()
    assert not store.exists("requests/a.json")
    room[0] = 5
    watch.look()
    assert not store.exists("requests/a.json")  # Not yet time to look again.
    now[0] += LOOK_SECONDS
    watch.look()
    assert b"resize" in store.read("requests/a.json")
    store.delete("requests/a.json")
    now[0] += LOOK_SECONDS
    watch.look()
    assert not store.exists("requests/a.json")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_node_lost_shrinks_the_gang_and_a_new_one_lets_it_grow(small: tuple[str, ...], tmp_path: Path) -> None:
    run, log = RunFolder(str(tmp_path / "run")), tmp_path / "log"
    with log.open("w") as stream:
        command = [sys.executable, "-m", "tests.shrink_and_grow", run.url, *small, "training.total_tokens=2048000"]
        code = subprocess.run(command, cwd=ROOT, stdout=stream, stderr=stream, check=False).returncode
    assert code == 0, log.read_text()[-4000:]
    segments = run.segments()
    assert [segment["plan"]["world_size"] for segment in segments] == [2, 1, 2]
    assert [segment["cause"] for segment in segments] == ["start", "worker lost", "resume"]
    assert [segment["end"]["reason"] for segment in segments] == ["interrupted", "resized", "completed"]
    steps = [snapshot.step for snapshot in run.snapshots()]
    assert steps == list(range(25, 1001, 25))
    assert run.store.keys("requests") == []
