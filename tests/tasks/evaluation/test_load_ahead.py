"""Checkpoints in turn: each is itself, the next one is read meanwhile, and no more than that."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.storage import open_store
from configs.errors import UserError
from tasks.checkpoints.safetensors_header import CheckpointError
from tasks.checkpoints.start_point import StartPoint
from tasks.evaluation import load_ahead as module
from tasks.evaluation.held_out import HeldOutSuite, build_network
from tasks.evaluation.load_ahead import load_ahead
from tests.network_run import begin_network_run, commit_network, damage, disk_tensors, network_config

CONFIG = network_config()
HEAD = "lm_head.weight"
PATIENCE_SECONDS = 60


@pytest.fixture
def urls(tmp_path: Path) -> list[str]:
    run = begin_network_run(str(tmp_path / "run"), 4, CONFIG)
    return [snapshot.url for snapshot in run.snapshots()]


class Watched:
    """Loads as they begin and end, by the last part of their URL."""

    def __init__(self, load: Callable[..., Any]) -> None:
        self._load = load
        self.begun: list[str] = []
        self.ended = threading.Semaphore(0)

    def __call__(self, network: torch.nn.Module, url: str, start: StartPoint | None) -> Any:
        self.begun.append(url)
        loaded = self._load(network, url, start)
        self.ended.release()
        return loaded


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    made = Watched(module._load)
    monkeypatch.setattr(module, "_load", made)
    return made


@pytest.mark.parametrize("num_networks", [1, 2])
def test_each_is_yielded_with_its_own_weights_in_order(urls: list[str], num_networks: int) -> None:
    networks = [build_network(CONFIG) for _ in range(num_networks)]
    seen = []
    for loaded in load_ahead(networks, urls):
        step = int(loaded.url[-9:])
        assert torch.equal(dict(loaded.network.named_parameters())[HEAD], disk_tensors(CONFIG, step)[HEAD])
        seen.append(loaded.url)
    assert seen == urls


def test_next_is_read_while_one_is_in_use_and_none_beyond(urls: list[str], watched: Watched) -> None:
    turns = load_ahead([build_network(CONFIG), build_network(CONFIG)], urls)
    for number in range(len(urls)):
        next(turns)
        # Nobody asks for more, and yet the next one arrives; the one after it is not begun, for it has no network.
        for _ in range(2 if number == 0 else int(number + 1 < len(urls))):
            assert watched.ended.acquire(timeout=PATIENCE_SECONDS)
        assert watched.begun == urls[: number + 2]


def test_single_network_is_not_loaded_while_in_use(urls: list[str], watched: Watched) -> None:
    turns = load_ahead([build_network(CONFIG)], urls)
    for number in range(len(urls)):
        next(turns)
        assert watched.begun == urls[: number + 1]


def test_failures_are_told_in_their_turn_and_others_go_on(urls: list[str], tmp_path: Path) -> None:
    damage(open_store(urls[1]), "model-00001-of-00001.safetensors")
    other = tmp_path / "other"
    wide = network_config("model.hidden_size=64")
    commit_network(open_store(str(other)), wide, seed=1, step=1)
    asked = [urls[0], urls[1], str(other), str(tmp_path / "nothing"), urls[2]]
    loaded = list(load_ahead([build_network(CONFIG), build_network(CONFIG)], asked))
    assert [type(item.error) for item in loaded] == [
        type(None),
        CheckpointError,
        CheckpointError,
        UserError,
        type(None),
    ]
    assert "does not fit the network" in str(loaded[2].error)


def test_given_up_half_way_it_leaves_no_thread(urls: list[str]) -> None:
    turns = load_ahead([build_network(CONFIG), build_network(CONFIG)], urls)
    next(turns)
    turns.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("load-ahead")]


def test_losses_in_turn_are_those_of_each_alone(urls: list[str], tmp_path: Path) -> None:
    together = list(HeldOutSuite(str(tmp_path / "a"), CONFIG).evaluate_each(urls))
    for outcome in together:
        alone = HeldOutSuite(str(tmp_path / "b"), CONFIG).evaluate(outcome.url)
        assert outcome.evaluation is not None
        assert (outcome.evaluation.digest, outcome.evaluation.slices) == (alone.digest, alone.slices)
    assert len({outcome.evaluation.loss for outcome in together if outcome.evaluation}) == len(urls)
