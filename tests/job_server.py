"""A job server on loopback that behaves badly on request: drops connections, goes away, lies about how a job ended."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

JOB = {
    "type": "SUBMISSION",
    "entrypoint": "python",
    "status": "RUNNING",
    "driver_exit_code": None,
    "message": "Running.",
}
LIVE_CHARACTERS = 40
"""Size of the pieces in which a log is sent."""


@dataclass(kw_only=True)
class FakeJobServer:
    """What it knows and how it misbehaves; tests write these fields while it serves."""

    ray_version: str
    """Version that it claims to run."""
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Id to the job's details."""
    log: str = ""
    """Log of every job."""
    cuts: list[int] = field(default_factory=list)
    """Characters that each of the next attachments to a log gets before its connection is cut."""
    outages: int = 0
    """Questions for a job that are cut off before it answers again."""
    refuse: int = 0
    """HTTP status of every answer; 0 answers."""
    lose_answer: bool = False
    """Whether a submission is taken and its answer lost."""
    nodes: list[dict[str, Any]] = field(default_factory=list)
    """Nodes of the cluster."""
    ends: dict[str, Any] = field(default_factory=dict)
    """Details that a job takes once a log was sent to its end."""
    submitted: list[dict[str, Any]] = field(default_factory=list)
    """Requests to submit."""
    num_attached: int = 0
    """Attachments to logs so far."""
    url: str = ""
    """Where it serves."""

    def __enter__(self) -> FakeJobServer:
        self._loop = asyncio.new_event_loop()
        started = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(started,), daemon=True)
        self._thread.start()
        assert started.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def add(self, submission_id: str, **details: Any) -> None:
        """Put a job into the table."""
        self.jobs[submission_id] = {**JOB, "submission_id": submission_id, **details}

    def _serve(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        application = web.Application(middlewares=[self._refuse])
        application.add_routes(
            [
                web.get("/api/version", self._version),
                web.get("/api/v0/nodes", self._nodes),
                web.get("/api/jobs/", self._list),
                web.post("/api/jobs/", self._submit),
                web.get("/api/jobs/{id}", self._info),
                web.get("/api/jobs/{id}/logs", self._logs),
                web.get("/api/jobs/{id}/logs/tail", self._tail),
            ]
        )
        runner = web.AppRunner(application, access_log=None)
        self._loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        self._loop.run_until_complete(site.start())
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        started.set()
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())
        self._loop.close()

    @web.middleware
    async def _refuse(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if self.refuse:
            return web.Response(status=self.refuse, text="no")
        answer: web.StreamResponse = await handler(request)
        return answer

    async def _version(self, _: web.Request) -> web.Response:
        return web.json_response(
            {"version": "4", "ray_version": self.ray_version, "ray_commit": "", "session_name": ""}
        )

    async def _nodes(self, _: web.Request) -> web.Response:
        return web.json_response({"data": {"result": {"result": self.nodes}}})

    async def _list(self, _: web.Request) -> web.Response:
        return web.json_response(list(self.jobs.values()))

    async def _submit(self, request: web.Request) -> web.Response:
        values = await request.json()
        self.submitted.append(values)
        submission_id = values["submission_id"]
        if submission_id in self.jobs:
            return web.Response(status=500, text=f"{submission_id} already exists")
        self.add(submission_id)
        if self.lose_answer:
            _cut(request)
        return web.json_response({"job_id": submission_id, "submission_id": submission_id})

    async def _info(self, request: web.Request) -> web.Response:
        if self.outages:
            self.outages -= 1
            _cut(request)
        job = self.jobs.get(request.match_info["id"])
        return web.json_response(job) if job else web.Response(status=404, text="does not exist")

    async def _logs(self, _: web.Request) -> web.Response:
        return web.json_response({"logs": self.log})

    async def _tail(self, request: web.Request) -> web.StreamResponse:
        self.num_attached += 1
        cut = self.cuts.pop(0) if self.cuts else len(self.log)
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        for start in range(0, cut, LIVE_CHARACTERS):
            await socket.send_str(self.log[start : min(start + LIVE_CHARACTERS, cut)])
        if cut < len(self.log):
            _cut(request)
        else:
            self.jobs[request.match_info["id"]].update(self.ends)
            await socket.close()
        return socket


def _cut(request: web.Request) -> None:
    assert request.transport is not None
    request.transport.abort()
