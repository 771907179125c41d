"""A real Chromium for the tests of pages: what it complains of, and what axe-core finds."""

import shutil
from typing import Any

import pytest

from tests.pipeline.review import ReviewServer

SLOW_MS = 120_000  # a machine that others use as well
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def watched(browser: Any, server: ReviewServer, **context: Any) -> tuple[Any, list[str]]:
    """A new page, and what it complains of: console, exceptions, dialogs, requests elsewhere."""
    page = browser.new_context(**context).new_page()
    page.set_default_timeout(SLOW_MS)
    complaints: list[str] = []
    page.on("console", lambda message: message.type in ("error", "warning") and complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda asked: asked.url.split("/")[2] == server.host or complaints.append(asked.url))
    page.on("dialog", lambda dialog: complaints.append(dialog.message))
    return page, complaints


def barriers(page: Any) -> list[str]:
    """What axe-core finds against WCAG 2.2 AA: rule and element."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    rules = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
    found = axe.run(page, options={"runOnly": rules}).response
    assert len(found["passes"]) > 15
    return [f"{rule['id']}: {node['html'][:200]}" for rule in found["violations"] for node in rule["nodes"]]
