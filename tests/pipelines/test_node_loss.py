"""Nodes of a cluster are lost while they merge and while they train: the work completes with the same digests."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.fan_out import fan_out_local
from tasks.checkpoints.reader import open_checkpoint
from tasks.checkpoints.run_folder import RunFolder
from tasks.merging.merge import execute_merge
from tasks.merging.methods import MethodChoice
from tasks.merging.plan import plan_merge

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(420)]
ROOT = Path(__file__).parents[2]


def test_nodes_lost_in_a_merge_and_in_training_change_no_digest(
    demo_run: tuple[Path, dict[str, Any]], small: tuple[str, ...], tmp_path: Path
) -> None:
    whole = RunFolder(str(demo_run[0]))
    inputs = [snapshot.url for snapshot in whole.snapshots()[3:6]]
    run = RunFolder(str(tmp_path / "run"))
    log = tmp_path / "log"
    with log.open("w") as stream:
        command = [sys.executable, "-m", "tests.lose_nodes", str(tmp_path), ",".join(inputs), run.url, *small]
        code = subprocess.run(command, cwd=ROOT, stdout=stream, stderr=stream, check=False).returncode
    assert code == 0, log.read_text()[-4000:]
    answer = json.loads((tmp_path / "answer.json").read_text())

    alone = plan_merge(
        [open_checkpoint(url) for url in inputs],
        MethodChoice(method="ema", alpha=0.2),
        output_url=str(tmp_path / "alone"),
        shard_bytes=64 << 10,
    )
    report = execute_merge(alone, lambda function, tasks: fan_out_local(function, tasks, num_workers=2), lambda: None)
    merge = answer["merge"]
    assert merge["digest"] == report.manifest.digest
    assert merge["shards"] == [shard.digest for shard in report.manifest.shards]
    # Some task had begun on the node that was killed, and began again elsewhere.
    assert merge["on_lost_node"] >= 1
    assert merge["begun"] > merge["tasks"]

    assert answer["train"]["causes"] == ["start", "worker lost"]
    expected = {s.step: (s.digest, s.manifest.state_digest) for s in whole.snapshots()}
    assert {s.step: (s.digest, s.manifest.state_digest) for s in run.snapshots()} == expected
    merged = run.merged()
    assert {name: m.digest for name, m in merged.items()} == {
        name: whole.merged()[name].digest for name in whole.merged() if name in merged
    }
    assert len(merged) == len(expected) - 2
