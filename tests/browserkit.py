"""A real Chromium for tests of pages, driven by Playwright.

Debian's packages bring the browser: `apt-get install chromium`, done here where CI=true.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


def executable() -> str:
    """Chromium's path; skips where there is none and none may be installed."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None and os.environ.get("CI") == "true" and shutil.which("apt-get"):
        root = [] if os.geteuid() == 0 else ["sudo", "-n"]
        for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", "chromium"]):
            subprocess.run([*root, "apt-get", *command], check=True, capture_output=True, timeout=600)
        found = shutil.which("chromium")
    if found is None:
        pytest.skip("there is no chromium; apt-get install chromium brings it (with CI=true this test does that)")
    return found


@contextmanager
def chromium() -> Iterator[Any]:
    """The browser; skips where it or Playwright is missing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=executable(), args=["--no-sandbox"])  # root has no sandbox
        yield started
        started.close()
