"""Chromium without a window, for tests that look at pages as a user does."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import BrowserContext, Page, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium is installed (Debian: apt-get install chromium); it is what opens the pages"
)


@contextmanager
def browser(width: int = 1500, height: int = 950) -> Iterator[BrowserContext]:
    """A new profile; what a page asks of another machine than this one fails the test."""
    foreign: list[str] = []
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        context = running.new_context(viewport={"width": width, "height": height})
        context.on("request", lambda request: foreign.append(request.url) if _is_foreign(request.url) else None)
        yield context
        running.close()
    assert not foreign, foreign


def _is_foreign(url: str) -> bool:
    return not url.startswith(("http://127.0.0.1:", "file:", "data:", "blob:"))


def text_of(page: Page) -> str:
    return page.inner_text("body")
