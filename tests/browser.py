"""A headless Chromium, controlled through a pipe with the DevTools protocol; needs no port, driver or network."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, Literal

Theme = Literal["light", "dark"]

# JavaScript expression: the texts of all table cells that are cut off by their box, the table or the window.
CUT = (
    "[...document.querySelectorAll('td, th')].filter(c => c.getClientRects().length && (c.scrollWidth > c.clientWidth + 1 "
    "|| c.getBoundingClientRect().right > window.innerWidth || c.getBoundingClientRect().right > "
    "c.closest('table').parentElement.getBoundingClientRect().right + 1)).map(c => c.innerText)"
)
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
)


# The protocol is on descriptors 3 and 4 of the browser; both are moved out of the way first.
_START = """
import fcntl, os, sys
given = [fcntl.fcntl(int(number), fcntl.F_DUPFD_CLOEXEC, 10) for number in sys.argv[1:3]]
for wanted, descriptor in zip((3, 4), given):
    os.dup2(descriptor, wanted)
os.execv(sys.argv[3], sys.argv[3:])
"""


def find_chromium() -> str | None:
    """Path of a Chromium or Chrome on this machine."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next((path for name in names if (path := shutil.which(name)) is not None), None)


class Page:
    """One page of a browser.

    Attributes:
      problems: console warnings and errors, exceptions, and failed requests.
      requests: URLs of all requests.
    """

    def __init__(self, commands: int, replies: BufferedReader) -> None:
        self._commands, self._replies = commands, replies
        self._number, self._rest, self._session = 0, b"", None
        self.problems: list[str] = []
        self.requests: list[str] = []
        self._loaded = False
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            chunk = self._replies.read1(65536)
            if not chunk:
                raise RuntimeError("the browser has ended")
            self._rest += chunk
        message, self._rest = self._rest.split(b"\0", 1)
        out: dict[str, Any] = json.loads(message)
        return out

    def _note(self, message: dict[str, Any]) -> None:
        method, params = message.get("method"), message.get("params", {})
        if method == "Log.entryAdded" and params["entry"]["level"] in ("warning", "error"):
            self.problems.append(params["entry"]["text"])
        elif method == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("warning", "error", "assert"):
            self.problems.append(json.dumps(params["args"]))
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Network.loadingFailed":
            self.problems.append(params["errorText"])
        elif method == "Page.loadEventFired":
            self._loaded = True

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Sends a command of the protocol and returns its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._commands, data) :]
        while (reply := self._read()).get("id") != self._number:
            self._note(reply)
        if "error" in reply:
            raise RuntimeError(f"{method}: {reply['error']}")
        out: dict[str, Any] = reply["result"]
        return out

    def open(self, path: Path, *, width: int = 1280, height: int = 900, theme: Theme = "light") -> None:
        """Loads a file in a window of `width` x `height` CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self.call(
            "Emulation.setEmulatedMedia",
            media="screen",
            features=[{"name": "prefers-color-scheme", "value": theme}],
        )
        self._loaded = False
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not self._loaded:
            self._note(self._read())

    def evaluate(self, expression: str) -> Any:
        """Returns the value of a JavaScript expression."""
        reply = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in reply:
            raise RuntimeError(json.dumps(reply["exceptionDetails"]))
        return reply["result"].get("value")

    def press(self, key: str) -> None:
        """Presses and releases a key such as `Enter`."""
        text = {"text": "\r"} if key == "Enter" else {}
        code = {"Enter": 13, "Tab": 9}[key]
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text
            )

    def screenshot(self, path: Path) -> None:
        """Writes the whole page as a PNG file."""
        reply = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(reply["data"]))

    def print_pdf(self, path: Path) -> None:
        """Prints the page to a PDF file."""
        self.call("Emulation.setEmulatedMedia", media="", features=[])
        reply = self.call("Page.printToPDF", preferCSSPageSize=True, printBackground=False)
        path.write_bytes(base64.b64decode(reply["data"]))


@contextlib.contextmanager
def open_browser(chromium: str, profile: Path) -> Iterator[Page]:
    """Runs a browser with a new profile within the context.

    Args:
      chromium: path of the browser.
      profile: empty directory for its profile.
    """
    to_browser, commands = os.pipe()
    replies, from_browser = os.pipe()
    start = [sys.executable, "-ISc", _START, str(to_browser), str(from_browser)]
    process = subprocess.Popen(
        [*start, chromium, *_FLAGS, f"--user-data-dir={profile}"],
        pass_fds=(to_browser, from_browser),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_browser)
    os.close(from_browser)
    try:
        with os.fdopen(replies, "rb") as file:
            page = Page(commands, file)
            yield page
            with contextlib.suppress(RuntimeError, OSError):
                page.call("Browser.close")
    finally:
        os.close(commands)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
