"""The gang's proof, shared out over ranks, that a run begins with the weights that it was begun for."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.run_lease import hold_run
from tasks.checkpoints.run_folder import RunFolder
from tests.plain_gang import end_members, start_members, train_plainly
from tests.stage_arms import ask, losses, make_parent, plain_copy

# Losses of two ranks are summed in another order than those of one.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return make_parent(tmp_path_factory.mktemp("initial") / "parent")


def test_two_ranks_prove_and_load_what_one_does(parent: RunFolder, tmp_path: Path) -> None:
    init = plain_copy(parent.snapshots()[-1].url, tmp_path / "foreign")
    found = {}
    for world_size in (1, 2):
        (pair,) = ask(tmp_path / str(world_size), init)
        with hold_run(pair.init.run) as lease:
            train_plainly(pair.init.run, pair.init.config, lease, world_size, tmp_path)
        found[world_size] = losses(pair.init.run)
    assert len(found[1]) == 20
    assert found[2] == pytest.approx(found[1], abs=TOLERANCE)


def test_every_rank_refuses_weights_of_which_one_byte_changed(parent: RunFolder, tmp_path: Path) -> None:
    init = plain_copy(parent.snapshots()[-1].url, tmp_path / "foreign")
    (pair,) = ask(tmp_path, init)
    file = Path(init) / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with hold_run(pair.init.run) as lease:
        members = start_members(pair.init.run, pair.init.config, lease, 2, tmp_path)
        errors = end_members(members)
    assert [member.returncode for member in members] == [1, 1]
    assert all("WeightsReplaced" in error and "put the checkpoint back" in error for error in errors)
    assert pair.init.run.segments() == []


def test_rank_that_cannot_read_its_share_is_named_by_the_others(parent: RunFolder, tmp_path: Path) -> None:
    (pair,) = ask(tmp_path, plain_copy(parent.snapshots()[-1].url, tmp_path / "foreign"))
    # The second rank alone meets a disk that fails.
    prelude = (
        "import tasks.training.initial_weights as module\n"
        "def fail(_):\n"
        "    raise OSError('the disk of this rank failed')\n"
        "if rank == 1: module.tensor_digests = fail\n"
    )
    with hold_run(pair.init.run) as lease:
        members = start_members(pair.init.run, pair.init.config, lease, 2, tmp_path, prelude=prelude)
        first, second = end_members(members)
    assert [member.returncode for member in members] == [1, 1]
    assert "the disk of this rank failed" in second
    assert "rank 1 could not say: the disk of this rank failed" in first
