"""A page that lives on while the test looks at it: Chromium's DevTools protocol over a pipe.

`--dump-dom` leaves out what is inside shadow roots, which is where TensorBoard draws, and a page that keeps loading has
no moment at which it is done. Here a test asks until the page answers.
"""

from __future__ import annotations

import base64
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.browser import Browser

PATIENCE_SECONDS = 120.0

_WITH_PIPE = """
import os, sys
read, write = (os.dup(os.dup(os.dup(int(number)))) for number in sys.argv[1:3])
os.dup2(read, 3)
os.dup2(write, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""Chromium reads commands from descriptor 3 and answers on 4. The third copy of a descriptor is neither of them."""


class Page:
    """One page. Messages are JSON objects, each ended by a zero byte."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._from = to_browser, from_browser
        self._number = 0
        self._received = b""
        self._session: dict[str, str] = {}
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}

    def open(
        self, url: str, width: int = 1200, height: int = 1800, theme: str = "light", *, touched: bool = False
    ) -> None:
        """Go there, on a telephone where it is `touched`. The page is not loaded yet when this returns."""
        self._call("Emulation.setTouchEmulationEnabled", enabled=touched)
        self._call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": touched}
        self._call("Emulation.setDeviceMetricsOverride", **size)
        self._call("Page.navigate", url=url)

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def ask_until_true(self, expression: str) -> Any:
        """The value of an expression as soon as it is something."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not (value := self.ask(expression)):
            assert time.monotonic() < deadline, f"still {value!r} after {PATIENCE_SECONDS:.0f} s: {expression}"
            time.sleep(0.2)
        return value

    def save_picture(self, path: Path) -> None:
        """What is to be seen now, as PNG."""
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot")["data"]))

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters, **self._session}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            line, end, rest = self._received.partition(b"\0")
            if not end:
                ready, _, _ = select.select([self._from], [], [], max(deadline - time.monotonic(), 0))
                assert ready, f"no answer to {method} within {PATIENCE_SECONDS:.0f} s"
                part = os.read(self._from, 1 << 20)
                assert part, f"the browser ended before it answered {method}"
                self._received += part
                continue
            self._received = rest
            answer = json.loads(line)
            if answer.get("id") == self._number:  # the rest are events
                assert "error" not in answer, (method, answer["error"])
                return dict(answer["result"])


@contextmanager
def page_in(browser: Browser) -> Iterator[Page]:
    """A browser of its own with one empty page, ended at the end of the block."""
    their_in, to_browser = os.pipe()
    from_browser, their_out = os.pipe()
    command = [sys.executable, "-c", _WITH_PIPE, str(their_in), str(their_out)]
    command += browser.command("about:blank", "--remote-debugging-pipe")
    process = subprocess.Popen(
        command, pass_fds=(their_in, their_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(their_in)
    os.close(their_out)
    try:
        yield Page(to_browser, from_browser)
    finally:
        os.close(to_browser)  # which ends the browser
        os.close(from_browser)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
