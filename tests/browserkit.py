"""A real Chromium for tests of pages, driven by Playwright.

Debian's packages bring the browser: `apt-get install chromium`, done here where CI=true.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
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
        # root has no sandbox; without a GPU frames are drawn in the browser's own processes
        started = driver.chromium.launch(executable_path=executable(), args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


@contextmanager
def opened(
    browser: Any, path: Path, width: int = 1280, scheme: str = "light", *, of: Path | None = None, **more: Any
) -> Iterator[Any]:
    """A page in a context of its own.

    At the end: nothing on the console, no dialog, and no request but for the file itself, or for files in the folder `of`.
    """
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, **more)
    said: list[str] = []
    asked: list[str] = []
    try:
        page = context.new_page()
        page.set_default_timeout(60_000)  # a machine that does other work draws no frame for seconds
        page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: said.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (said.append("a dialog"), dialog.dismiss()))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        yield page
        page.wait_for_timeout(100)
        assert said == []
        assert [url for url in asked if not url.startswith(((of or path).as_uri(), "data:"))] == []
    finally:
        context.close()
