"""One browser for all tests of the page."""

from __future__ import annotations

import pytest

from tests.viewer.browser import open_browser, why_none


@pytest.fixture(scope="session")
def browser():
    reason = why_none()
    if reason:
        pytest.skip(reason)
    with open_browser() as opened:
        yield opened
