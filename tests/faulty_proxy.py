"""A reverse proxy on loopback that does to HTTP requests what networks and busy servers do.

It forwards what it does not break unchanged, the ``Host`` header included, which S3 signatures cover.
"""

from __future__ import annotations

import contextlib
import http.client
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

SLOW_PIECES = 4
SLOW_PAUSE_SECONDS = 0.02
LONGEST_DELAY_SECONDS = 0.1


@dataclass(frozen=True)
class Request:
    """What a fault is chosen by."""

    method: str
    path: str
    headers: dict[str, str]

    @property
    def operation(self) -> str:
        """Short name of the S3 operation."""
        query = parse_qs(urlsplit(self.path).query, keep_blank_values=True)
        if "uploadId" in query:
            return {"PUT": "part", "POST": "complete", "DELETE": "abort"}.get(self.method, "parts")
        if "uploads" in query:
            return "start" if self.method == "POST" else "uploads"
        if "list-type" in query:
            return "list"
        return self.method.lower()


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong."""

    kind: str
    """``answer`` (instead of forwarding), ``drop`` (before forwarding), ``lose`` (the response), ``truncate``
    (the body), ``slow`` (body), ``delay`` (before forwarding), ``ignore_range``."""
    status: int = 0
    """Of an ``answer``."""
    code: str = ""
    """S3's name of the error in an ``answer``."""


SLOW_DOWN = Fault("answer", 503, "SlowDown")
INTERNAL_ERROR = Fault("answer", 500, "InternalError")
CONFLICT = Fault("answer", 409, "ConditionalRequestConflict")
DROP, LOSE, TRUNCATE, SLOW, DELAY = (Fault(kind) for kind in ("drop", "lose", "truncate", "slow", "delay"))
IGNORE_RANGE = Fault("ignore_range")

Choose = Callable[[Request], Fault | None]


def no_fault(request: Request) -> Fault | None:
    """The usual day."""
    return None


def always(fault: Fault) -> Choose:
    """``fault`` in every request."""

    def choose(request: Request) -> Fault | None:
        return fault

    return choose


def seeded_faults(seed: int, rate: float) -> Choose:
    """A fault of any kind in ``rate`` of all requests."""
    chance, guard = random.Random(seed), threading.Lock()

    def choose(request: Request) -> Fault | None:
        with guard:
            if chance.random() >= rate:
                return None
            return chance.choice((SLOW_DOWN, INTERNAL_ERROR, DROP, LOSE, TRUNCATE, SLOW, DELAY))

    return choose


def first(count: int, operation: str, fault: Fault) -> Choose:
    """``fault`` in the first ``count`` requests of one operation."""
    left, guard = [count], threading.Lock()

    def choose(request: Request) -> Fault | None:
        with guard:
            if request.operation != operation or not left[0]:
                return None
            left[0] -= 1
            return fault

    return choose


class FaultyProxy(ThreadingHTTPServer):
    """The proxy; set :attr:`choose` at any time."""

    daemon_threads = True

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urlsplit(upstream).netloc
        self.choose: Choose = no_fault
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.one_at_a_time = ""
        """Operation whose requests wait for each other, for servers that check and act in two steps."""
        self.turn = threading.Lock()
        self.guard = threading.Lock()
        self.faults: Counter[str] = Counter()
        """Faults so far, by kind."""
        self.running: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        """Most requests at once so far, by operation."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients go away; that is the point."""


@contextmanager
def faulty_proxy(upstream: str) -> Iterator[FaultyProxy]:
    """Run a proxy in front of ``upstream`` in threads of this process."""
    with FaultyProxy(upstream) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: FaultyProxy
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.onward = http.client.HTTPConnection(self.server.upstream, timeout=60)

    def finish(self) -> None:
        self.onward.close()
        super().finish()

    def log_message(self, format: str, *values: object) -> None:  # noqa: A002
        """Nothing: URLs may be secrets."""

    def handle_request(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = Request(self.command, self.path, dict(self.headers.items()))
        fault = self.server.choose(request)
        with self.server.guard:
            self.server.faults[fault.kind if fault else "none"] += 1
            self.server.running[request.operation] += 1
            now = self.server.running[request.operation]
            self.server.peak[request.operation] = max(now, self.server.peak[request.operation])
        try:
            with self.server.turn if request.operation == self.server.one_at_a_time else contextlib.nullcontext():
                self.carry_out(request, body, fault)
        finally:
            with self.server.guard:
                self.server.running[request.operation] -= 1

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_request  # noqa: N815

    def carry_out(self, request: Request, body: bytes, fault: Fault | None) -> None:
        kind = fault.kind if fault else ""
        if fault and kind == "answer":
            text = f"<?xml version='1.0'?><Error><Code>{fault.code}</Code><Message>on purpose</Message></Error>"
            self.answer(fault.status, [("Content-Type", "application/xml")], text.encode(), "")
            return
        if kind == "drop":
            self.close_connection = True
            return
        if kind == "delay":
            time.sleep(random.uniform(0, LONGEST_DELAY_SECONDS))
        status, headers, answer = self.forward(request, body)
        if kind == "ignore_range":
            status, headers = 200, [(name, value) for name, value in headers if name.lower() != "content-range"]
        if kind == "lose":
            self.close_connection = True
            return
        self.answer(status, headers, answer, kind)

    def forward(self, request: Request, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        self.onward.putrequest(request.method, request.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in ("expect", "connection"):
                self.onward.putheader(name, value)
        self.onward.endheaders(body or None)
        response = self.onward.getresponse()
        headers = [(name, value) for name, value in response.getheaders() if name.lower() != "transfer-encoding"]
        return response.status, headers, response.read()

    def answer(self, status: int, headers: list[tuple[str, str]], body: bytes, kind: str) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("content-length", "connection") or self.command == "HEAD":
                self.send_header(name, value)
        if self.command == "HEAD":
            self.end_headers()
            return
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if kind == "truncate" and body:
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        elif kind == "slow":
            size = len(body) // SLOW_PIECES + 1
            for start in range(0, len(body), size):
                self.wfile.write(body[start : start + size])
                time.sleep(SLOW_PAUSE_SECONDS)
        else:
            self.wfile.write(body)
