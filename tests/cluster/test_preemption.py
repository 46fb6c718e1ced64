"""Being told to end: the signal in a process of one's own, and both kinds of notice in a real Ray Train gang."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.preemption import install, stop_requested

ROOT = Path(__file__).parents[2]
PLAIN = """
import os, signal
from cluster.preemption import install, stop_requested
assert not stop_requested()
assert install()
os.kill(os.getpid(), signal.SIGTERM)
assert stop_requested()
print("goes on", flush=True)
os.kill(os.getpid(), signal.SIGTERM)
print("not reached", flush=True)
"""
# A gang whose second worker is told to end, by a signal from outside and then by a drain of its node.
GANG = """
import json, os, signal, subprocess, sys, tempfile, threading, time
from pathlib import Path
os.environ.update(
    RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", RAY_TRAIN_METRICS_ENABLED="0", OMP_NUM_THREADS="1",
    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.5", RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S="0.5", PYTHONPATH=os.getcwd(),
)
import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from cluster.preemption import preemptible

def body(config):
    import os, time, ray, torch, torch.distributed as dist
    from pathlib import Path
    from cluster.preemption import stop_requested
    if dist.get_rank() == 1:
        note = Path(config["note"])
        note.with_suffix(".tmp").write_text(f"{os.getpid()} {ray.get_runtime_context().get_node_id()}")
        note.with_suffix(".tmp").rename(note)
    step, told, ends_at = 0, False, time.monotonic() + 90
    while not told and time.monotonic() < ends_at:
        step += 1
        flag = torch.tensor([float(stop_requested())])
        dist.all_reduce(flag)
        told = bool(flag[0])
        time.sleep(0.02)
    steps = [torch.zeros(1) for _ in range(2)]
    dist.all_gather(steps, torch.tensor([float(step)]))
    return {"told": told, "steps": [float(s) for s in steps]}

def read(note):
    while not note.exists():
        time.sleep(0.1)
    return note.read_text().split()

def by_signal(note):
    os.kill(int(read(note)[0]), signal.SIGTERM)

def by_drain(note):
    node = read(note)[1]
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--node-id", node]
    command += ["--address", ray.get_runtime_context().gcs_address, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    subprocess.run([*command, "--reason-message", "test", "--deadline-remaining-seconds", "300"], check=True, stdout=2)

ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False)
answers = {}
with tempfile.TemporaryDirectory() as folder:
    for name, tell in (("signal", by_signal), ("drain", by_drain)):
        note = Path(folder, f"{name}-note")
        threading.Thread(target=tell, args=(note,), daemon=True).start()
        result = TorchTrainer(
            body, train_loop_config={"note": str(note)}, scaling_config=ScalingConfig(num_workers=2),
            run_config=RunConfig(name=name, storage_path=folder, failure_config=FailureConfig(max_failures=0)),
            torch_config=preemptible(backend="gloo", timeout_s=60),
        ).fit()
        answers[name] = result.return_value
print(json.dumps(answers), flush=True)
ray.shutdown()
"""


def test_first_sigterm_is_noted_and_the_second_ends_the_process() -> None:
    done = subprocess.run([sys.executable, "-c", PLAIN], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "goes on\n"), done.stderr


def test_install_off_the_main_thread_changes_nothing() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(install).result() is False
    assert signal.getsignal(signal.SIGTERM) is before
    assert not stop_requested()


@pytest.mark.slow
def test_workers_of_a_ray_gang_hear_of_a_signal_and_of_a_drained_node_and_stop_at_one_step() -> None:
    done = subprocess.run(
        [sys.executable, "-c", GANG],
        cwd=ROOT,
        env={key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN")},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    for name in ("signal", "drain"):
        assert answers[name]["told"], name
        first, second = answers[name]["steps"]
        assert first == second > 1
