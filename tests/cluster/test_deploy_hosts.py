"""Deploy files for machines without Kubernetes: the Slurm script, the crontab, systemd's units; and exit code 75 everywhere."""

from __future__ import annotations

import configparser
import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from deploy_files import DEPLOY, documents

SCRIPT = DEPLOY / "slurm" / "pretrain.sbatch"
BIN = Path(sys.executable).parent
WAIT_SECONDS = 30

# Stand-ins: srun runs the command here, ray keeps a process, pma waits for Ctrl-C or ends as it is told.
STAND_INS = {
    "srun": 'echo "$*" >>"$RECORD/srun"; while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "scontrol": 'if [[ $1 == show ]]; then echo node1; echo node2; else echo "$*" >>"$RECORD/scontrol"; fi',
    "hostname": "echo 10.0.0.1",
    "python": 'echo "$*" >"$RECORD/waited"; cat >/dev/null',
    "ray": '[[ $1 == health-check ]] && exit 0; echo "$*" >>"$RECORD/ray"; exec sleep 60',
    # Python, because a shell cannot undo that its background jobs start with Ctrl-C ignored; pma does the same.
    "pma": f"""exec {sys.executable} - "$@" <<'PY'
import os, pathlib, signal, sys, threading
record, token, stop = pathlib.Path(os.environ["RECORD"]), pathlib.Path(os.environ["RAY_AUTH_TOKEN_PATH"]), threading.Event()
signal.signal(signal.SIGINT, lambda number, frame: stop.set())
(record / "arguments").write_text(" ".join(sys.argv[1:]))
(record / "environment").write_text("\\n".join(f"{{key}}={{value}}" for key, value in os.environ.items()))
(record / "token").write_text(f"{{token.stat().st_mode & 0o777:o}} {{token.read_text()}}")
(record / "started").touch()
if "PMA_EXIT" in os.environ:
    sys.exit(int(os.environ["PMA_EXIT"]))
sys.exit(130 if stop.wait({WAIT_SECONDS}) else 1)
PY""",
}


def write_stand_ins(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True)
    for name in names:
        path = folder / name
        path.write_text(f"#!/usr/bin/env bash\n{STAND_INS[name]}\n")
        path.chmod(0o755)


class SlurmJob:
    """The script in a session of its own, with stand-ins for Slurm, Ray and pma."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self.record, self.home = folder / "record", folder / "home"
        self.record.mkdir()
        self.home.mkdir()
        write_stand_ins(folder / "bin", ["srun", "scontrol", "hostname"])
        write_stand_ins(folder / "root" / ".venv" / "bin", ["ray", "pma", "python"])
        environment = {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "HOME": str(self.home),
            "RECORD": str(self.record),
            "SLURM_SUBMIT_DIR": str(folder / "root"),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_CPUS_PER_TASK": "16",
            **settings,
        }
        with (folder / "log").open("w") as log:
            self.process = subprocess.Popen(
                ["bash", str(SCRIPT), "--config", "tiny", "--run", "s3://bucket/run"],
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait_started(self) -> None:
        """Until the driver runs and both of Ray's steps were asked for."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not ((self.record / "started").exists() and len(self.said("ray")) == 2):
            assert self.process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def code(self) -> int:
        return self.process.wait(WAIT_SECONDS)

    def said(self, name: str) -> list[str]:
        path = self.record / name
        return path.read_text().splitlines() if path.exists() else []

    def end(self) -> None:
        """End what the batch step leaves behind, as Slurm does."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[SlurmJob]:
    job = SlurmJob(tmp_path)
    yield job
    job.end()


def test_slurm_script_passes_shellcheck() -> None:
    command = [str(BIN / "shellcheck"), "--shell=bash"]
    good = subprocess.run([*command, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert good.returncode == 0, good.stdout
    spoilt = SCRIPT.read_text().replace('kill -INT "$driver"', "kill -INT $drivers")
    bad = subprocess.run([*command, "-"], input=spoilt, capture_output=True, text=True, check=False)
    assert "SC2154" in bad.stdout
    assert subprocess.run(["bash", "-n", str(SCRIPT)], check=False).returncode == 0


def test_slurm_job_starts_a_head_without_processors_and_workers_behind_a_private_token(slurm: SlurmJob) -> None:
    slurm.wait_started()
    assert slurm.said("arguments") == ["pretrain --config tiny --run s3://bucket/run"]
    # Both steps run side by side, so their order in the record is free.
    worker, head = sorted(slurm.said("ray"), key=lambda line: "--head" in line)
    assert "--num-cpus=0" in head
    assert "--dashboard-host=127.0.0.1" in head
    assert "--address=10.0.0.1:20007 --num-cpus=16 --labels=pool=train" in worker
    steps = " ".join(sorted(slurm.said("srun")))
    assert "--nodes=1 --ntasks-per-node=1 --nodelist=node1 " in steps
    assert "--nodes=2 --ntasks-per-node=1 --nodelist=node1,node2 " in steps
    assert slurm.said("waited") == ["- 32"]  # two nodes of 16
    environment = dict(line.split("=", 1) for line in slurm.said("environment") if "=" in line)
    assert environment["RAY_ADDRESS"] == "10.0.0.1:20007"
    assert environment["RAY_AUTH_MODE"] == "token"
    mode, token = slurm.said("token")[0].split()
    assert mode == "600"
    assert len(token) == 64


def test_slurm_job_near_its_time_limit_stops_cleanly_and_is_queued_again(slurm: SlurmJob) -> None:
    slurm.wait_started()
    slurm.process.send_signal(signal.SIGUSR1)
    assert slurm.code() == 130
    assert slurm.said("scontrol") == ["requeue 7"]
    assert list(slurm.home.iterdir()) == []  # the token is gone


def test_slurm_job_that_is_cancelled_stops_cleanly_and_stays_away(slurm: SlurmJob) -> None:
    slurm.wait_started()
    slurm.process.send_signal(signal.SIGTERM)
    assert slurm.code() == 130
    assert slurm.said("scontrol") == []


@pytest.mark.parametrize("code", [0, 1, 2, 75])
def test_slurm_job_ends_with_the_code_of_the_driver(tmp_path: Path, code: int) -> None:
    job = SlurmJob(tmp_path, PMA_EXIT=str(code))
    try:
        assert job.code() == code
        assert job.said("scontrol") == []
    finally:
        job.end()


def crontab_commands() -> list[str]:
    """Commands of the crontab, without the five fields of the schedule."""
    lines = (DEPLOY / "cron" / "crontab").read_text().splitlines()
    entries = [line.split(maxsplit=5) for line in lines if line[:1] not in ("#", "") and line.count("*") >= 2]
    # In a crontab % ends the command unless it is escaped.
    assert not any("%" in entry[5] for entry in entries)
    return [entry[5] for entry in entries]


def driver_command(entrypoint: str) -> str:
    """What the driver's shell gets of a RayJob's entry point: KubeRay pastes it behind ``ray job submit --`` into a bash
    script, and Ray's command line quotes again what that bash made of it."""
    script = f'ray() {{ printf "%s\\0" "${{@:4}}"; }}; ray job submit -- {entrypoint} ;'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    return shlex.join(done.stdout.split("\0")[:-1])


def test_pretraining_reaches_the_driver_as_it_is_written() -> None:
    entrypoint = documents()["rayjob-pretrain.yaml: RayJob/pretrain"]["spec"]["entrypoint"]
    assert shlex.split(driver_command(entrypoint)) == shlex.split(entrypoint)
    assert shlex.split(driver_command("pma tick || true")) != shlex.split("pma tick || true")


def scheduled_commands() -> dict[str, str]:
    """Every scheduled command line that has to read 75 as success."""
    manifests = documents()
    cron = manifests["cronjob-tick.yaml: CronJob/tick"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    ray = driver_command(manifests["raycronjob-tick.yaml: RayCronJob/tick"]["spec"]["jobTemplate"]["entrypoint"])
    tick, clean_up = crontab_commands()
    return {
        "crontab tick": tick,
        "crontab gc": clean_up,
        "CronJob": cron["containers"][0]["args"][0],
        "RayCronJob": ray,
    }


@pytest.mark.parametrize("name", scheduled_commands())
@pytest.mark.parametrize(("code", "is_success"), [(0, True), (75, True), (1, False), (2, False), (130, False)])
def test_schedule_counts_only_0_and_75_as_success(tmp_path: Path, name: str, code: int, is_success: bool) -> None:
    programs = tmp_path / "pmaflow" / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "pma").write_text(f'#!/bin/sh\necho "$*" >"{tmp_path}/arguments"\nexit {code}\n')
    (programs / "pma").chmod(0o755)
    (tmp_path / ".pma").mkdir()
    (tmp_path / ".pma" / "env").write_text("PMA_RUN=s3://bucket/run\n")
    environment = {"HOME": str(tmp_path), "PATH": f"{programs}:{os.environ['PATH']}", "PMA_RUN": "s3://bucket/run"}
    done = subprocess.run(["bash", "-c", scheduled_commands()[name]], env=environment, check=False)
    assert (done.returncode == 0) is is_success
    assert "--run s3://" in (tmp_path / "arguments").read_text()


def test_cronjob_passes_usage_errors_on_to_its_failure_policy() -> None:
    job = documents()["cronjob-tick.yaml: CronJob/tick"]["spec"]["jobTemplate"]["spec"]
    rule = job["podFailurePolicy"]["rules"][0]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [2])
    assert rule["onExitCodes"]["containerName"] == job["template"]["spec"]["containers"][0]["name"]
    done = subprocess.run(["bash", "-c", f"pma() {{ return 2; }}; {scheduled_commands()['CronJob']}"], check=False)
    assert done.returncode == 2


UNITS = sorted((DEPLOY / "systemd").iterdir())
KEYS = {
    "Unit": {"Description", "Documentation", "Wants", "After"},
    "Service": {
        "Type", "User", "EnvironmentFile", "ExecStart", "SuccessExitStatus", "KillSignal", "TimeoutStopSec",
        "TimeoutStartSec", "WorkingDirectory", "StateDirectory", "NoNewPrivileges", "PrivateTmp", "ProtectHome",
        "ProtectSystem", "CapabilityBoundingSet", "Nice", "Restart", "RestartSec", "RestartPreventExitStatus",
    },
    "Timer": {"OnCalendar", "Persistent", "RandomizedDelaySec", "Unit"},
    "Install": {"WantedBy"},
}  # fmt: skip


def unit(path: Path) -> dict[str, dict[str, str]]:
    """Sections of a unit file, refusing what is written twice."""
    parser = configparser.ConfigParser(interpolation=None, delimiters=("=",), strict=True)
    parser.optionxform = lambda optionstr: optionstr  # type: ignore[method-assign]
    parser.read_string(path.read_text())
    return {section: dict(parser[section]) for section in parser.sections()}


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_unit_has_known_keys_only(path: Path) -> None:
    for section, keys in unit(path).items():
        assert set(keys) <= KEYS[section]


def test_units_belong_together() -> None:
    tick, timer, watch = (
        unit(DEPLOY / "systemd" / f"pma-{name}") for name in ("tick.service", "tick.timer", "watch.service")
    )
    assert timer["Timer"]["Unit"] == "pma-tick.service"
    assert tick["Service"]["Type"] == "oneshot"
    assert tick["Service"]["SuccessExitStatus"] == "75"
    assert "Install" not in tick  # the timer starts it
    assert watch["Service"]["RestartPreventExitStatus"] == "2"
    assert {item["Service"]["KillSignal"] for item in (tick, watch)} == {"SIGINT"}
    assert "PMA_RUN=" in (DEPLOY / "pma.env.example").read_text()


def verify_units(folder: Path) -> str:
    """What systemd says of the units; their program, which is not installed here, is replaced by one that is."""
    for path in UNITS:
        (folder / path.name).write_text(path.read_text().replace("/opt/pmaflow/.venv/bin/pma", "/bin/true"))
    names = [str(folder / path.name) for path in UNITS]
    done = subprocess.run(["systemd-analyze", "verify", *names], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


if shutil.which("systemd-analyze"):

    def test_systemd_accepts_the_units(tmp_path: Path) -> None:
        assert [line for line in verify_units(tmp_path).splitlines() if "pma-" in line] == []

    def test_systemd_notices_a_misspelt_key(tmp_path: Path) -> None:
        verify_units(tmp_path)
        spoilt = tmp_path / "pma-tick.service"
        spoilt.write_text(spoilt.read_text().replace("KillSignal=", "KillSignals="))
        done = subprocess.run(["systemd-analyze", "verify", str(spoilt)], capture_output=True, text=True, check=False)
        assert "KillSignals" in done.stderr
