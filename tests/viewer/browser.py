"""A browser for the tests of the page: Debian's chromium, driven by Playwright."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
PLACE = Path(__file__).resolve().parents[2] / "tl_clt" / "viewer" / "page"


def why_none() -> str | None:
    """Why there is no browser here, or None where there is one."""
    if find_spec("playwright") is None:
        return 'no playwright here: pip install -e ".[test]"'
    return None if CHROMIUM else "no chromium here: apt-get install chromium"


@contextmanager
def open_browser() -> Iterator[Any]:
    """A headless chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@dataclass
class Watched:
    """A page, with what it asked the network for and what it complained of."""

    page: Any
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


def watch(browser: Any, **options: Any) -> Watched:
    """A new page whose requests and complaints are noted."""
    options = {"viewport": {"width": 1280, "height": 800}, **options}
    watched = Watched(browser.new_context(**options).new_page())
    watched.page.on("request", lambda request: watched.requests.append(request.url))
    watched.page.on("pageerror", lambda error: watched.complaints.append(str(error)))

    def note(message: Any) -> None:
        if message.type in ("error", "warning"):
            watched.complaints.append(message.text)

    watched.page.on("console", note)
    watched.page.set_default_timeout(10_000)
    return watched


def wait_until(page: Any, expression: str) -> None:
    """Wait until JavaScript is true. Playwright's own way evaluates text, which the page's policy forbids."""
    for _ in range(500):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(20)
    raise AssertionError(f"never true: {expression}")
