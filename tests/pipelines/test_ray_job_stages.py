"""Continued training and SFT as Ray jobs, and what MLflow says of their arms: whose weights, which data, below what."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_data import pairs, write_rows
from local_gang import train
from ray_head import BIN, RayHead
from registered import make_database
from short_run import SMALL, begin

from tasks.checkpoints.run_folder import RunFolder

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).parent.parent.parent
JOB_SECONDS = 400
LENGTH, BATCH = 48, 192
CHAT = (
    "data.format=chat", "data.chat_template=plain", "data.held_out_fraction=0.3", "evaluation.num_slices=2",
    f"training.sequence_length={LENGTH}", f"training.batch_tokens={BATCH}", f"training.total_tokens={4 * BATCH}",
    f"snapshots.interval_tokens={2 * BATCH}", f"anneal.tokens={BATCH}", "schedule.warmup_tokens=0",
    f"evaluation.slice_tokens={2 * LENGTH}",
)  # fmt: skip
"""Four steps on chat rows."""


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    cluster = RayHead()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()


def run_job(head: RayHead, *command: str) -> dict[str, Any]:
    """``ray job submit`` of the documentation, to its end; what the pipeline answered."""
    environment = json.dumps({"env_vars": {"OMP_NUM_THREADS": "1", "RAY_JOB_STOP_SIGNAL": "SIGINT"}})
    options = ["--address", head.url, "--working-dir", ".", "--runtime-env-json", environment]
    pipeline = ["--", "python", "-m", "pipelines", *command, "--json"]
    done = subprocess.run(
        [str(BIN / "ray"), "job", "submit", *options, *pipeline],
        cwd=ROOT,
        env=head.environment,
        capture_output=True,
        text=True,
        timeout=JOB_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    answer = json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])
    assert isinstance(answer, dict)
    return answer


def test_mlflow_tells_lineage_tree_and_data_of_arms_that_ran_as_ray_jobs(head: RayHead, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    text = tmp_path / "text"
    text.mkdir()
    for number in range(60):
        (text / f"{number}.txt").write_text(f"text of file {number}: " + "the same words again. " * (number + 10))
    rows = write_rows(tmp_path / "rows.jsonl", pairs(120))
    shape = [item for item in SMALL if not item.startswith("data.")]
    sources = (f"data.sources=['{text}/*.txt']", "data.held_out_fraction=0.2")
    parent, config = begin(tmp_path / "parent", "training.total_tokens=2560", *sources)
    train(parent, config)
    early, late = parent.snapshots()
    uri = make_database(tmp_path)
    arms = ("--init", late.url, "--control", early.url)
    tracked = f"tracking.uri={uri}"

    continued = run_job(
        head, "continue-training", "--config", "tiny", "--run", str(tmp_path / "ct"), *arms,
        *shape, *sources, "training.total_tokens=1280", "snapshots.interval_tokens=640", "anneal.tokens=128",
        "schedule.warmup_tokens=0", tracked,
    )  # fmt: skip
    tuned = run_job(
        head, "sft", "--config", "tiny", "--run", str(tmp_path / "sft"), *arms,
        *shape, *CHAT, f"data.sources=['{rows}']", tracked,
    )  # fmt: skip
    for answer in (continued, tuned):
        assert (answer["init"]["digest"], answer["control"]["init"]["digest"]) == (late.digest, early.digest)

    client = MlflowClient(tracking_uri=uri)
    (experiment,) = [e.experiment_id for e in client.search_experiments() if e.name != "Default"]
    found = client.search_runs([experiment])
    for folder, suffix in (("ct", "*.txt"), ("sft", "rows.jsonl")):
        url = RunFolder(str(tmp_path / folder)).url
        runs = {run.data.tags["pma.part"]: run for run in found if run.data.tags["pma.run_url"] == url}
        top, control = runs["run"], runs["branches/control"]
        for run, start in ((top, late), (control, early)):
            assert (run.data.tags["pma.init_url"], run.data.tags["pma.init_digest"]) == (start.url, start.digest)
            inputs = {item.dataset.name: item for item in run.inputs.dataset_inputs}
            assert {name: item.tags[0].value for name, item in inputs.items()} == {
                "tiny": "training",
                "held-out": "evaluation",
            }
            assert json.loads(inputs["tiny"].dataset.source)["sources"][0].endswith(suffix)
        # Matched arms read the same data.
        digests = [{i.dataset.digest for i in run.inputs.dataset_inputs} for run in (top, control)]
        assert digests[0] == digests[1]
        children = {part for part, run in runs.items() if run.data.tags.get("mlflow.parentRunId") == top.info.run_id}
        assert children == set(runs) - {"run"}
        assert {"branches/control", "segment/1", "evaluations"} <= children
        assert top.data.tags["mlflow.note.content"].startswith("**Final held-out loss ")
        assert {"final_loss"} <= {key.removeprefix("comparison/") for key in top.data.metrics}
