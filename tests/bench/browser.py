"""A headless Chromium for tests: that of the environment variable CHROMIUM, or one that the system has."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@contextmanager
def chromium() -> Iterator[Any]:
    """Yields playwright's browser, or skips the test and says what is missing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs `pip install playwright`")
    program = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip("needs Chromium: `apt-get install chromium`, or its path in the environment variable CHROMIUM")
    root = hasattr(os, "geteuid") and os.geteuid() == 0  # for whom Chromium starts without its sandbox only
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"] if root else [])
        yield browser
        browser.close()
