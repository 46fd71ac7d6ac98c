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


CUT = """() => {
  const found = [];
  const edge = document.documentElement.clientWidth + 1;
  const scrolls = (node) => /auto|scroll/.test(getComputedStyle(node).overflowX);
  const isInside = (node) => node !== null && (scrolls(node) || isInside(node.parentElement));
  for (const node of document.querySelectorAll('body *')) {
    if (node.closest('.unseen, .skip, svg, .plotbox') || !node.checkVisibility({ visibilityProperty: true })) continue;
    const named = () => found.push(`${node.tagName}.${node.className}: ${node.textContent.slice(0, 60)}`);
    if (node.getBoundingClientRect().right > edge && !isInside(node)) named();
    const { overflowX, overflowY } = getComputedStyle(node);
    const hides = (way) => way === 'hidden' || way === 'clip';
    if (node.textContent.trim() && !node.closest('progress, option')) {
      if (hides(overflowX) && node.scrollWidth > node.clientWidth + 1) named();
      else if (hides(overflowY) && node.scrollHeight > node.clientHeight + 1) named();
    }
  }
  return found;
}"""
"""What stands beyond the window or is hidden by its own box, and cannot be scrolled to."""

MOVING = """() => {
  const timed = (style) => parseFloat(style.transitionDuration) > 0.001 || parseFloat(style.animationDuration) > 0.001;
  const moves = (style) => style.scrollBehavior === 'smooth' || timed(style);
  const moving = [...document.querySelectorAll('*')].filter((node) => moves(getComputedStyle(node)));
  return [document.getAnimations().length, moving.map((node) => `${node.tagName}.${node.className}`)];
}"""


def fits(page: Page) -> None:
    """On a phone, and at a zoom of 200 %, where the window is half as wide: no sideways scroll, nothing cut off."""
    for width, height in ((640, 400), (360, 800)):
        page.set_viewport_size({"width": width, "height": height})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        cut = page.evaluate(CUT)
        assert cut == [], (width, cut)
    page.set_viewport_size({"width": 1280, "height": 800})


def calm(page: Page) -> None:
    """Nothing moves by itself for those who asked for that."""
    page.emulate_media(reduced_motion="reduce")
    assert page.evaluate(MOVING) == [0, []]
    page.emulate_media(reduced_motion="null")


def in_both_themes(page: Page, name: str) -> None:
    for theme in ("light", "dark"):
        found = serious(page)
        assert found == [], (theme, found)
        picture(page, f"{name}-{theme}")
        # Also behind a dialog, where nobody could press it.
        page.locator("#theme").evaluate("node => node.click()")
    fits(page)
    calm(page)
