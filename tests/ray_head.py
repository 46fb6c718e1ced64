"""A real Ray head on loopback: own process, token authentication, dashboard; killed as machines are lost."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil

BIN = Path(sys.executable).parent
MARK = "PMA_TEST_CLUSTER"
"""Environment variable by which the processes of a head are known; jobs inherit it."""
START_SECONDS = 90


class RayHead:
    """A cluster of one node; it may be killed and started again, on other ports."""

    def __init__(self, num_cpus: int = 3) -> None:
        self.num_cpus = num_cpus
        self.token = secrets.token_hex(16)
        self.url = ""
        self.mark = secrets.token_hex(8)
        # Ray's sockets lie below it, and the path of a socket has at most 107 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="pma-", dir="/tmp"))
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """Environment of clients: the address and the token."""
        return {
            **{key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")},
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_API_SERVER_ADDRESS": self.url,
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
        }

    def start(self) -> None:
        """Start the head and wait until it takes jobs."""
        port, dashboard, agent, client = _free_ports(4)
        self.url = f"http://127.0.0.1:{dashboard}"
        arguments = {
            "node-ip-address": "127.0.0.1",
            "port": port,
            "dashboard-host": "127.0.0.1",
            "dashboard-port": dashboard,
            "dashboard-agent-listen-port": agent,
            "ray-client-server-port": client,
            "min-worker-port": 0,
            "max-worker-port": 0,
            "num-cpus": self.num_cpus,
            "object-store-memory": 100 << 20,
            "temp-dir": self.folder / secrets.token_hex(3),
        }
        # An image's `python` is the one that has Ray; here that is this environment's.
        path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        with (self.folder / "head.log").open("ab") as log:
            self._process = subprocess.Popen(
                [BIN / "ray", "start", "--head", "--block", *(f"--{key}={value}" for key, value in arguments.items())],
                env={**self.environment, "PATH": path, MARK: self.mark},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._wait()

    def kill(self) -> None:
        """SIGKILL every process of the cluster, its jobs and workers included, at once."""
        while members := self.members():
            for member in members:
                try:
                    member.send_signal(signal.SIGKILL)
                except psutil.NoSuchProcess:
                    continue
            if self._process is not None:
                self._process.wait()
            psutil.wait_procs(members, timeout=1)

    def members(self) -> list[psutil.Process]:
        """Processes of this cluster that run: of the head's session, with its mark, and all that these started."""
        found = {process.pid: process for process in psutil.process_iter() if self._is_member(process)}
        for process in list(found.values()):
            try:
                found.update({child.pid: child for child in process.children(recursive=True)})
            except psutil.NoSuchProcess:
                continue
        return [process for process in found.values() if _is_running(process)]

    def find(self, *words: str) -> list[psutil.Process]:
        """Members whose command line has all ``words``, shells aside."""
        found = []
        for process in self.members():
            try:
                line = process.cmdline()
            except psutil.Error:
                continue
            if all(word in " ".join(line) for word in words) and not line[0].endswith("sh"):
                found.append(process)
        return found

    def close(self) -> None:
        """End it and remove its files."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _is_member(self, process: psutil.Process) -> bool:
        # Ray's agents and workers write their title over their environment; they stay in the head's session.
        if self._process is None:
            return False
        try:
            return os.getsid(process.pid) == self._process.pid or process.environ().get(MARK) == self.mark
        except (psutil.Error, ProcessLookupError):
            return False

    def _wait(self) -> None:
        request = urllib.request.Request(f"{self.url}/api/version", headers={"Authorization": f"Bearer {self.token}"})
        deadline = time.monotonic() + START_SECONDS
        while True:
            assert self._process is not None and self._process.poll() is None, (self.folder / "head.log").read_text()
            try:
                urllib.request.urlopen(request, timeout=5).close()
                return
            except (urllib.error.URLError, OSError):
                assert time.monotonic() < deadline, (self.folder / "head.log").read_text()
                time.sleep(0.2)


def _is_running(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports
