"""What every page must bear: both themes, a narrow window, and the eyes of axe."""

import os
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page

PICTURES = os.environ.get("TRAINYARD_SCREENSHOTS")
"""A folder for pictures of each page; none are made without it."""

SERIOUS = ("serious", "critical")


def picture(page: Page, name: str) -> None:
    if PICTURES is None:
        return
    Path(PICTURES).mkdir(parents=True, exist_ok=True)
    for width, place in ((1280, "desktop"), (360, "phone")):
        page.set_viewport_size({"width": width, "height": 800})
        # Charts are drawn when they are seen: all of the page, once.
        page.set_viewport_size({"width": width, "height": page.evaluate("document.documentElement.scrollHeight")})
        page.evaluate("() => new Promise(done => setTimeout(done, 700))")
        page.screenshot(path=f"{PICTURES}/{name}-{place}.png", full_page=True)
    page.set_viewport_size({"width": 1280, "height": 800})


def serious(page: Page) -> list[Any]:
    """What axe finds that keeps somebody out. Its script runs in the page's own world, past the policy."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    found = axe.Axe().run(page).response["violations"]
    return [(one["id"], [node["html"][:120] for node in one["nodes"]]) for one in found if one["impact"] in SERIOUS]


def no_sideways_scroll(page: Page) -> None:
    """On a phone, and at a zoom of 200 %, where the window is half as wide."""
    for width in (640, 360):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.set_viewport_size({"width": 1280, "height": 800})


def in_both_themes(page: Page, name: str) -> None:
    for theme in ("light", "dark"):
        found = serious(page)
        assert found == [], (theme, found)
        picture(page, f"{name}-{theme}")
        # Also behind a dialog, where nobody could press it.
        page.locator("#theme").evaluate("node => node.click()")
    no_sideways_scroll(page)
