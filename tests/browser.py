"""Chromium without a window, as the tests of pages drive it. It reaches this machine and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ARTIFACTS = Path(__file__).parents[1] / "artifacts"
"""Where pictures of pages are left for people to look at; not under version control."""
THEMES = {"dark": 0, "light": 1}
"""Blink's preferredColorScheme."""

_CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


class Browser:
    """Opens one page per call, with a profile of its own in `folder`."""

    def __init__(self, folder: Path) -> None:
        if _CHROMIUM is None:
            reason = "chromium is not on PATH; install the package `chromium`"
            if os.environ.get("CI", "").lower() not in ("", "0", "false"):
                pytest.fail(f"CI promises a browser, but {reason}", pytrace=False)
            pytest.skip(reason)
        self._profile = folder / "profile"

    def __call__(
        self, url: str, *options: str, width: int = 1200, height: int = 1800, theme: str = "light"
    ) -> subprocess.CompletedProcess[str]:
        size = (f"--window-size={width},{height}", f"--blink-settings=preferredColorScheme={THEMES[theme]}")
        command = self.command(url, *size, *options)
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)

    def command(self, url: str, *options: str) -> list[str]:
        """The command line."""
        return [
            _CHROMIUM or "",
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--disable-background-networking",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            f"--user-data-dir={self._profile}",
            *options,
            url,
        ]


def fresh_picture(name: str) -> Path:
    """A path under `ARTIFACTS` where no picture of an earlier run is left."""
    ARTIFACTS.mkdir(exist_ok=True)
    path = ARTIFACTS / name
    path.unlink(missing_ok=True)
    return path
