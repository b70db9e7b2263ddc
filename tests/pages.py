"""Headless Chromium for tests of HTML pages: opens a file and says what went wrong in it.

Speaks the DevTools protocol over a pipe (file descriptors 3 and 4 of the browser), so it needs no driver, no port and
no network; every host name is mapped to nothing, so that a page that reaches out is seen and gets nowhere.

    with open_browser() as browser:
        page = browser.open(path, width=390)
        assert page.errors == [] and page.requests == []
        assert page.evaluate("document.title") == "..."
        page.screenshot(tmp_path / "page.png")
"""

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-component-update",
    "--disable-background-networking", "--disable-sync", "--disable-extensions", "--hide-scrollbars", "--mute-audio",
    "--disable-dev-shm-usage", "--host-resolver-rules=MAP * ~NOTFOUND", "--remote-debugging-pipe",
)  # fmt: skip
PATIENCE = 60.0  # seconds for one answer of the browser
SETTLED = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))"


class Page:
    """One open page: its console errors, the requests that left it, and what scripts in it answer."""

    def __init__(self, browser: "Browser", session: str, path: Path) -> None:
        self._browser, self._session, self._path = browser, session, path

    @property
    def errors(self) -> list[str]:
        """Errors and warnings of the console, uncaught exceptions, and what the page's own policy blocked."""
        found = []
        for event in self._events():
            kind, data = event["method"], event["params"]
            if kind == "Runtime.consoleAPICalled" and data["type"] in ("error", "warning", "assert"):
                found.append(" ".join(str(a.get("value", a.get("description"))) for a in data["args"]))
            elif kind == "Runtime.exceptionThrown":
                detail = data["exceptionDetails"]
                found.append(detail.get("exception", {}).get("description", detail["text"]))
            elif kind == "Log.entryAdded" and data["entry"]["level"] in ("error", "warning"):
                found.append(data["entry"]["text"])
        return found

    @property
    def requests(self) -> list[str]:
        """Addresses asked for beyond the page itself and what it carries (data:, blob:)."""
        asked = [e["params"]["request"]["url"] for e in self._events() if e["method"] == "Network.requestWillBeSent"]
        return [url for url in asked if url != self._path.as_uri() and not url.startswith(("data:", "blob:"))]

    def evaluate(self, script: str) -> Any:
        """Value of a JavaScript expression; a promise is awaited. What it throws fails the test."""
        answer = self._call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def screenshot(self, path: Path) -> Path:
        """The whole page, not only what the window shows, as a PNG file."""
        shot = self._call("Page.captureScreenshot", captureBeyondViewport=True, format="png")
        path.write_bytes(base64.b64decode(shot["data"]))
        return path

    def pdf(self, path: Path) -> Path:
        """The page as it prints, on A4."""
        sheet = self._call("Page.printToPDF", printBackground=True, paperWidth=8.27, paperHeight=11.69)
        path.write_bytes(base64.b64decode(sheet["data"]))
        return path

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.call(method, session=self._session, **params)

    def _events(self) -> list[dict[str, Any]]:
        self.evaluate(SETTLED)
        return [e for e in self._browser.events if e.get("sessionId") == self._session]


class Browser:
    """A running Chromium."""

    def __init__(self, process_input: int, process_output: int) -> None:
        self._to, self._from = process_input, process_output
        self._numbers, self._rest = itertools.count(1), b""
        self.events: list[dict[str, Any]] = []

    def open(self, path: Path, *, width: int = 1440, height: int = 900, dark: bool = False) -> Page:
        """Open a local file in a window of this size, and wait until it is drawn."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable", session=session)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", session=session, **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", session=session, features=[scheme])
        self.call("Page.navigate", session=session, url=path.resolve().as_uri())
        self._wait_for("Page.loadEventFired", session)
        page = Page(self, session, path.resolve())
        page.evaluate(SETTLED)
        return page

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Send one command and wait for its answer; events that come meanwhile are kept."""
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        os.write(self._to, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        for answer in self._messages():
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
        raise AssertionError("unreachable")

    def _wait_for(self, method: str, session: str) -> None:
        seen = [e for e in self.events if e["method"] == method and e.get("sessionId") == session]
        if not seen:
            next(m for m in self._messages() if m.get("method") == method and m.get("sessionId") == session)

    def _messages(self) -> Iterator[dict[str, Any]]:
        deadline = time.monotonic() + PATIENCE
        while True:
            while b"\0" in self._rest:
                raw, self._rest = self._rest.split(b"\0", 1)
                message = json.loads(raw)
                if "method" in message:
                    self.events.append(message)
                yield message
            ready, _, _ = select.select([self._from], [], [], max(deadline - time.monotonic(), 0))
            assert ready, f"Chromium said nothing for {PATIENCE:.0f} s"
            piece = os.read(self._from, 1 << 20)
            assert piece, "Chromium ended"
            self._rest += piece


@contextmanager
def open_browser() -> Iterator[Browser]:
    """A fresh headless Chromium with an empty profile; skips the test where none is installed."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    to_browser, from_browser = _pipe(), _pipe()
    with tempfile.TemporaryDirectory(prefix="chromium", ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            preexec_fn=lambda: (os.dup2(to_browser[0], 3), os.dup2(from_browser[1], 4)), pass_fds=(3, 4),
            env=os.environ | {"HOME": profile},
        )  # fmt: skip
        os.close(to_browser[0])
        os.close(from_browser[1])
        browser = Browser(to_browser[1], from_browser[0])
        try:
            yield browser
            browser.call("Browser.close")
            process.wait(PATIENCE)
        finally:
            process.kill()
            process.wait()
            os.close(to_browser[1])
            os.close(from_browser[0])


def _pipe() -> tuple[int, int]:
    """A pipe whose ends lie above 4, out of the way of the browser's own two descriptors."""
    ends = os.pipe()
    moved = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 5) for end in ends)
    for end in ends:
        os.close(end)
    return moved  # type: ignore[return-value]
