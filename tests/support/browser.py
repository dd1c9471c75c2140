"""A real browser for tests of pages: the system's Chromium, driven by Playwright."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from waiting import PATIENCE


def find_chromium() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


@contextmanager
def open_browser() -> Iterator:
    """A browser without a window; skips where Playwright or Chromium is not there."""
    api = pytest.importorskip(
        "playwright.sync_api", reason="the extra [browser] is not installed: Playwright is missing"
    )
    path = find_chromium()
    if path is None:
        pytest.skip("Chromium is not installed")
    # a sandbox needs rights that root, and many systems' users, do not have; the pages are our own
    given = {"args": ["--no-sandbox"], "timeout": 1000 * PATIENCE}
    with api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, **given)
        yield browser
        browser.close()
