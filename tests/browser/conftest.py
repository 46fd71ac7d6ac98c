"""A real browser, and a service on a real socket."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("playwright", reason="playwright is not installed")

from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.service.rig import Rig

CHROMIUM = shutil.which("chromium")
PATIENCE_MS = 60_000
POLICY = "Content Security Policy"


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path / "home", f"sqlite:///{tmp_path}/trainyard.db")
    yield made
    made.close()
    made.database.close()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """One for all tests; each has a context, and so a cache and a store, of its own."""
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    made = browser.new_page()
    blocked: list[str] = []
    made.on("console", lambda said: blocked.append(said.text) if POLICY in said.text else None)
    made.set_default_timeout(PATIENCE_MS)
    expect.set_options(timeout=PATIENCE_MS)
    yield made
    made.close()
    assert blocked == [], "the pages and the chart library must bear the policy"
