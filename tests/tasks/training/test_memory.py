"""A model that cannot fit is refused with numbers; an allocation that fails says what takes less."""

from __future__ import annotations

import pytest
import torch

from configs.errors import UserError
from configs.load import load_config
from tasks.training import memory
from tasks.training.memory import explain_out_of_memory, require_memory
from tasks.training.sharding.materialise import build_on_meta
from tasks.training.sharding.mesh import plan_mesh

CPU = torch.device("cpu")


def test_state_that_does_not_fit_is_refused_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    network = build_on_meta(load_config("moe-0.7b-7b").config)
    monkeypatch.setattr(memory, "host_bytes", lambda: 64 << 30)
    # 7,035,476,992 parameters (docs/models.md) x 16 bytes / 8 ranks = 13.1 GiB; 64 GiB / 8 = 8 GiB.
    with pytest.raises(
        UserError, match=r"at least 13\.1 GiB .*7,035,476,992 parameters x 16 bytes over 8 ranks.* 8\.0 GiB"
    ):
        require_memory(network, shards=8, ranks_here=8, device=CPU)
    require_memory(network, shards=8, ranks_here=4, device=CPU)


def test_replicas_do_not_share_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config("moe-0.7b-7b", ("training.num_workers=8", "training.data_parallel_replicas=2")).config
    monkeypatch.setattr(memory, "host_bytes", lambda: 20 << 30)
    shards = plan_mesh(config, 8).shards
    with pytest.raises(UserError, match=r"26\.2 GiB"):
        require_memory(build_on_meta(config), shards=shards, ranks_here=1, device=CPU)


def test_container_limit_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: pytest.TempPathFactory) -> None:
    from pathlib import Path

    limit = Path(str(tmp_path)) / "memory.max"
    monkeypatch.setattr(memory, "CGROUP_LIMIT", limit)
    whole = memory.host_bytes()
    limit.write_text("1048576\n")
    assert memory.host_bytes() == 1 << 20
    limit.write_text("max\n")
    assert memory.host_bytes() == whole


def test_failed_allocation_is_explained_and_other_errors_are_not() -> None:
    config = load_config("tiny", ("training.micro_batches=2",)).config
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    said = str(explain_out_of_memory(caught.value, config, rank=1, step=7))
    assert said.startswith("rank 1 ran out of memory at step 7: ")
    assert "1152921504606846976" in said and "training.micro_batches (now 2)" in said
    assert explain_out_of_memory(RuntimeError("shapes differ"), config, rank=0, step=0) is None
