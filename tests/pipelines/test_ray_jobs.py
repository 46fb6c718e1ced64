"""Pre-training as a Ray job: the driver and whole clusters are lost, and the same command still ends bit-identical."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray_head import BIN, RayHead

from tasks.checkpoints.run_folder import RunFolder

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).parent.parent.parent
POLL_SECONDS = 0.02
PATIENCE_SECONDS = 150
SHORT = (
    "training.total_tokens=409600",
    "evaluation.while_training=false",
    # Merges of many small tasks last for seconds, so that a cluster can be killed in the middle of one.
    "merge.shard_bytes=16384",
)
"""Eight snapshots and six merges."""
SUBMIT = """
import sys
from pipelines.console import run_command
from pipelines.render_submit import render_submission
from pipelines.submit import stop, submit
verb, *command = sys.argv[1:]
work = {
    "follow": lambda c: submit(c, as_json=True),
    "hold half a CPU": lambda c: submit(c, as_json=True, entrypoint_num_cpus=0.5),
    "leave": lambda c: submit(c, wait=False),
    "stop": stop,
}[verb]
sys.exit(run_command(lambda: work(command), render_submission, as_json=True, debug=False))
"""


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    """A running cluster; a test that kills it starts it again."""
    cluster = RayHead()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()


class Submitted:
    """A client process that follows a job."""

    def __init__(self, head: RayHead, command: list[str], log: Path) -> None:
        self.log = log
        with log.open("a") as out:
            self.process = subprocess.Popen(command, cwd=ROOT, env=head.environment, stdout=out, stderr=out)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, f"the moment never came\n{self.log.read_text()}"
            time.sleep(POLL_SECONDS)

    def exit_code(self) -> int:
        return self.process.wait(timeout=PATIENCE_SECONDS)

    def abandon(self) -> None:
        self.process.kill()
        self.process.wait()


def ray_job_submit(head: RayHead, command: tuple[str, ...], log: Path) -> Submitted:
    """The command of the documentation."""
    environment = json.dumps({"env_vars": {"OMP_NUM_THREADS": "1", "RAY_JOB_STOP_SIGNAL": "SIGINT"}})
    options = ["--address", head.url, "--working-dir", ".", "--runtime-env-json", environment]
    pipeline = ["--", "python", "-m", "pipelines", *command]
    return Submitted(head, [str(BIN / "ray"), "job", "submit", *options, *pipeline], log)


def pma_submit(head: RayHead, verb: str, command: tuple[str, ...], log: Path) -> Submitted:
    return Submitted(head, [sys.executable, "-c", SUBMIT, verb, *command], log)


def last_json(log: Path) -> dict[str, Any]:
    value = json.loads([line for line in log.read_text().splitlines() if line.startswith("{")][-1])
    assert isinstance(value, dict)
    return value


def snapshots_of(run: Path) -> int:
    return len(list((run / "snapshots").glob("*/manifest.json")))


def uncommitted_merges(run: Path) -> list[Path]:
    return [path for path in (run / "merged").glob("*") if not (path / "manifest.json").exists()]


def kill_driver(head: RayHead, run: Path) -> None:
    (driver,) = head.find("-m pipelines pretrain", str(run))
    driver.kill()


def test_pretrain_job_that_lost_its_driver_and_two_clusters_ends_with_the_same_digests(
    head: RayHead, pma: Callable[..., Any], small: tuple[str, ...], tmp_path: Path
) -> None:
    run, reference, log = tmp_path / "run", tmp_path / "reference", tmp_path / "log"
    overrides = (*small, *SHORT)
    command = ("pretrain", "--config", "tiny", "--run", str(run), "--json", *overrides)

    job = ray_job_submit(head, command, log)
    job.wait_until(lambda: snapshots_of(run) >= 1)
    workers = head.find("RayTrainWorker")
    assert len(workers) == 2
    assert all("_ray_pkg_" in worker.cwd() for worker in workers), "workers run what was shipped"
    kill_driver(head, run)
    assert job.exit_code() == 1
    assert "Job entrypoint command failed with exit code" in log.read_text()

    job = ray_job_submit(head, command, log)
    job.wait_until(lambda: snapshots_of(run) >= 3 and bool(uncommitted_merges(run)))
    head.kill()
    job.abandon()
    assert uncommitted_merges(run), "the merge was committed before the cluster died"

    head.start()
    job = ray_job_submit(head, command, log)
    job.wait_until(lambda: snapshots_of(run) >= 5)
    head.kill()
    job.abandon()
    assert 5 <= snapshots_of(run) < 8, "training was over before the cluster died"

    head.start()
    job = ray_job_submit(head, command, log)
    assert job.exit_code() == 0, log.read_text()

    whole_answer = pma("pretrain", "--config", "tiny", "--run", str(reference), *overrides)
    assert whole_answer.code == 0, whole_answer.stderr
    interrupted, whole = RunFolder(str(run)), RunFolder(str(reference))
    expected = {s.step: (s.manifest.digest, s.manifest.state_digest) for s in whole.snapshots()}
    assert {s.step: (s.manifest.digest, s.manifest.state_digest) for s in interrupted.snapshots()} == expected
    merged = {name: manifest.digest for name, manifest in whole.merged().items()}
    assert {name: manifest.digest for name, manifest in interrupted.merged().items()} == merged
    assert (len(expected), len(merged)) == (8, 6)
    assert [segment["cause"] for segment in interrupted.segments()] == ["start", "resume", "resume", "resume"]
    assert last_json(log)["digest"] == interrupted.snapshots()[-1].manifest.digest


def test_submit_twice_attaches_ctrl_c_detaches_and_stop_ends_the_pipeline_cleanly(
    head: RayHead, small: tuple[str, ...], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = ("pretrain", "--config", "tiny", "--run", str(run), *small)
    follower = pma_submit(head, "follow", command, tmp_path / "follower")
    follower.wait_until((run / "leases" / "run.json").exists)

    again = pma_submit(head, "follow", command, tmp_path / "again")
    again.wait_until(lambda: "Running entrypoint" in (tmp_path / "again").read_text())
    again.process.send_signal(signal.SIGINT)
    assert again.exit_code() == 130
    assert "attached to job run-pretrain-" in (tmp_path / "again").read_text()
    assert "goes on" in last_json(tmp_path / "again")["message"]

    asked = time.monotonic()
    assert pma_submit(head, "stop", command, tmp_path / "stop").exit_code() == 0
    assert time.monotonic() - asked < 30
    assert last_json(tmp_path / "stop")["status"] == "STOPPED"
    assert follower.exit_code() == 130
    assert "run the same command again to continue" in (tmp_path / "follower").read_text()
    assert '"released": true' in (run / "leases" / "run.json").read_text()


@pytest.mark.parametrize(("verb", "workers", "slots"), [("follow", 8, 3), ("hold half a CPU", 4, 2)])
def test_submit_to_a_cluster_too_small_for_the_gang_exits_2_and_names_both_sizes(
    head: RayHead, small: tuple[str, ...], tmp_path: Path, verb: str, workers: int, slots: int
) -> None:
    command = (
        "pretrain",
        "--config",
        "tiny",
        "--run",
        str(tmp_path / "run"),
        f"training.num_workers={workers}",
        *small,
    )
    job = pma_submit(head, verb, command, tmp_path / "log")
    assert job.exit_code() == 2
    answer = last_json(tmp_path / "log")
    assert f"needs {workers} CPUs at once, the cluster has {slots}" in answer["message"]
    assert (answer["error"], answer["exit_code"]) == ("UserError", 2)


def test_submit_with_a_wrong_token_exits_2_and_says_what_to_set(head: RayHead, tmp_path: Path) -> None:
    client = RayHead()
    client.url = head.url
    try:
        job = pma_submit(client, "leave", ("status", "--run", str(tmp_path)), tmp_path / "log")
        assert job.exit_code() == 2
    finally:
        client.close()
    assert "RAY_AUTH_TOKEN" in last_json(tmp_path / "log")["message"]
