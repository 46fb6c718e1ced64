"""A Chromium without a window, spoken to over pipes by the Chrome DevTools Protocol; no driver and no library needed."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars",
)  # fmt: skip
HOW_TO_GET_ONE = f"no browser on PATH ({', '.join(NAMES)}): the report is not tested in one. On Debian and Ubuntu: apt-get install chromium"
START_SECONDS, ANSWER_SECONDS = 120.0, 120.0


def find_browser() -> str:
    """Path of a Chromium or Chrome. Without one the test is skipped, and fails where ``PMA_REQUIRE_BROWSER`` is set, as in CI."""
    for name in NAMES:
        if path := shutil.which(name):
            return path
    if os.environ.get("PMA_REQUIRE_BROWSER"):
        pytest.fail(HOW_TO_GET_ONE)
    pytest.skip(HOW_TO_GET_ONE)


class Page:
    """One tab, and everything that it complained of or asked the network for."""

    def __init__(self, process: subprocess.Popen[bytes], reader: int, writer: int) -> None:
        self._process, self._reader, self._writer = process, reader, writer
        self._number, self._session, self._buffer = 0, "", b""
        self._events: list[dict[str, Any]] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def open(self, url: str) -> None:
        """Load ``url`` and wait until it is there."""
        self._events.clear()
        self.ask("Page.navigate", url=url)
        deadline = time.monotonic() + ANSWER_SECONDS
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            assert time.monotonic() < deadline, f"{url} did not load within {ANSWER_SECONDS:.0f} s"
            self._events.append(self._receive())

    def run(self, script: str) -> Any:
        """Value of the JavaScript expression ``script``, as JSON has it."""
        answer = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def prefer(self, scheme: str, *, motion: str = "no-preference") -> None:
        """Ask for ``light`` or ``dark`` colours, as the system's settings do."""
        features = [
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": motion},
        ]
        self.ask("Emulation.setEmulatedMedia", features=features)

    def resize(self, width: int, height: int) -> None:
        """Size of the window in CSS pixels."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def click(self, selector: str) -> None:
        """Click, with the mouse, where the element that ``selector`` finds is."""
        box = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'center', behavior: "
            "'instant'}); const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.ask("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def press(self, key: str, code: int, text: str = "") -> None:
        """Press and release a key, where the focus is."""
        for kind in ("keyDown", "keyUp"):
            extra = {"text": text} if text and kind == "keyDown" else {}
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **extra)

    def print_pdf(self) -> bytes:
        """What the printer would get, A4."""
        return base64.b64decode(self.ask("Page.printToPDF", paperWidth=8.27, paperHeight=11.69)["data"])

    def screenshot(self) -> bytes:
        """The window as PNG."""
        return base64.b64decode(self.ask("Page.captureScreenshot", format="png")["data"])

    def complaints(self) -> list[str]:
        """Exceptions, console messages and log entries since the page was opened."""
        self.run("0")
        wanted = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [json.dumps(event["params"])[:500] for event in self._events if event["method"] in wanted]

    def requests(self) -> list[str]:
        """URLs that were asked for since the page was opened."""
        found = [event for event in self._events if event["method"] == "Network.requestWillBeSent"]
        return [str(event["params"]["request"]["url"]) for event in found]

    def ask(self, method: str, **parameters: object) -> dict[str, Any]:
        """Send a command and return its result; events that come meanwhile are kept."""
        self._number += 1
        message: dict[str, object] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._writer, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._number:
            self._events.append(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        result: dict[str, Any] = answer["result"]
        return result

    def _receive(self) -> dict[str, Any]:
        """The next message; a browser that ends closes its pipe."""
        while b"\0" not in self._buffer:
            data = os.read(self._reader, 1 << 16)
            assert data, f"the browser ended with code {self._process.wait()}"
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        value: dict[str, Any] = json.loads(message)
        return value


@contextmanager
def open_browser(profile: Path, environment: Mapping[str, str] | None = None) -> Iterator[Page]:
    """A browser with an empty ``profile`` and one tab; it is ended on the way out."""
    (to_browser, from_us), (from_browser, to_us) = _pipe(), _pipe()
    # The protocol has file descriptors 3 and 4; bash, as sh may not know numbers above 9.
    redirect = f'exec "$@" 3<&{to_browser} 4>&{to_us} {to_browser}<&- {to_us}>&-'
    command = [
        "bash",
        "-c",
        redirect,
        "bash",
        find_browser(),
        *FLAGS,
        "--remote-debugging-pipe",
        f"--user-data-dir={profile}",
    ]
    process = subprocess.Popen(
        command, pass_fds=(to_browser, to_us), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    )
    os.close(to_browser)
    os.close(to_us)
    try:
        yield Page(process, from_browser, from_us)
    finally:
        os.close(from_us)
        os.close(from_browser)
        process.terminate()
        process.wait(START_SECONDS)


def _pipe() -> tuple[int, int]:
    """A pipe whose ends have numbers from 10 on: those below are taken in the browser."""
    ends = os.pipe()
    reader, writer = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
    for end in ends:
        os.close(end)
    return reader, writer
