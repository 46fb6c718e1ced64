"""Real workers that publish beside their steps: told to stop, resumed from an ephemeral snapshot, nothing lost."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.lease import hold_lease
from configs.load import load_config
from configs.schema import Config
from tasks.checkpoints.run_folder import RUN_LEASE, RunFolder, snapshot_key
from tasks.merging.verify import verify_checkpoint
from tests.gloo_ranks import end_ranks
from tests.plain_gang import start_members
from tests.token_data import write_text

# Rank 1 is sent SIGTERM once the file is there.
END_ME = """
import os, signal, threading, time
from pathlib import Path
from cluster.preemption import install

def end_me():
    while not Path({sign!r}).exists():
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGTERM)

assert install()
if rank == 1 and {sign!r}:
    threading.Thread(target=end_me, daemon=True).start()
"""
WORLD_SIZE = 2
STEPS = 60
INTERVAL = 20


def tiny(folder: Path) -> Config:
    write_text(folder, count=12, repeats=60)
    return load_config(
        "tiny",
        (
            f"data.sources=[{folder}]",
            "data.held_out_fraction=0.3",
            "model.hidden_size=32",
            "training.sequence_length=32",
            "training.batch_tokens=384",
            f"training.total_tokens={STEPS * 384}",
            f"snapshots.interval_tokens={INTERVAL * 384}",
            "schedule.warmup_tokens=768",
            "anneal.tokens=768",
            "evaluation.slice_tokens=64",
        ),
    ).config


def train(url: str, config: Config, *, stop_once_there: str = "") -> list[dict[str, Any]]:
    """What each rank returned."""
    run = RunFolder(url)
    run.begin(config)
    prelude = END_ME.format(sign=stop_once_there)
    with hold_lease(run.store, RUN_LEASE) as lease:
        said = end_ranks(start_members(run, config, lease, WORLD_SIZE, Path(url).parent, prelude=prelude))
    return [json.loads(out.splitlines()[-1]) for out in said]


@pytest.mark.slow
def test_gang_told_to_stop_publishes_stops_at_one_step_and_resumes_to_the_same_bits(tmp_path: Path) -> None:
    config = tiny(tmp_path / "text")
    train(str(tmp_path / "whole"), config)
    url = str(tmp_path / "stopped")
    often = replace(config, snapshots=replace(config.snapshots, ephemeral_seconds=1e-6))
    answers = train(url, often, stop_once_there=f"{url}/{snapshot_key(INTERVAL)}/manifest.json")
    assert answers[0] == answers[1]
    assert answers[0]["reason"] == "stopped"
    stopped_at = answers[0]["step"]
    assert INTERVAL < stopped_at < STEPS
    found = RunFolder(url).snapshots()
    # The first flag goes up before the first step.
    assert [found[0].step, found[-1].step] == [1, stopped_at]
    assert [s.ephemeral for s in found] == [s.step % INTERVAL != 0 for s in found]
    assert [s.url for s in found if verify_checkpoint(s.url).problems] == []

    (answer, _) = train(url, config)
    assert (answer["step"], answer["reason"]) == (STEPS, "completed")
    expected = RunFolder(str(tmp_path / "whole")).snapshots()
    resumed = [s for s in RunFolder(url).snapshots() if not s.ephemeral]
    assert [s.step for s in resumed] == [s.step for s in expected] == [20, 40, 60]
    for a, b in zip(expected, resumed, strict=True):
        assert (a.digest, a.manifest.state_digest) == (b.digest, b.manifest.state_digest)
        # What was measured before the stop counts, too.
        assert a.manifest.loss is not None
        assert b.manifest.loss is not None
        assert a.manifest.loss.steps == b.manifest.loss.steps == INTERVAL
        assert a.manifest.loss.maximum == b.manifest.loss.maximum
