"""Checks for every page: accessibility in both themes, no overflow in narrow windows, no motion if reduced."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, Route

SCREENSHOTS = os.environ.get("TRAINYARD_SCREENSHOTS")
"""Folder for a screenshot of each page; none are taken if unset."""

IMPACTS = ("serious", "critical")


def take_screenshots(page: Page, name: str) -> None:
    if SCREENSHOTS is None:
        return
    Path(SCREENSHOTS).mkdir(parents=True, exist_ok=True)
    for width, device in ((1280, "desktop"), (360, "phone")):
        page.set_viewport_size({"width": width, "height": 800})
        # Charts are drawn only while they are visible, so the window shows all of the page.
        page.set_viewport_size({"width": width, "height": page.evaluate("document.documentElement.scrollHeight")})
        page.evaluate("() => new Promise(done => setTimeout(done, 700))")
        page.screenshot(path=f"{SCREENSHOTS}/{name}-{device}.png", full_page=True)
    page.set_viewport_size({"width": 1280, "height": 800})


def axe_violations(page: Page) -> list[Any]:
    """Return the serious and critical findings of axe, which runs in the page's world and bypasses the policy."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    violations = axe.Axe().run(page).response["violations"]
    return [
        (one["id"], [node["html"][:120] for node in one["nodes"]]) for one in violations if one["impact"] in IMPACTS
    ]


OVERFLOWING = """() => {
  const found = [];
  const edge = document.documentElement.clientWidth + 1;
  const scrolls = (node) => /auto|scroll/.test(getComputedStyle(node).overflowX);
  const isInside = (node) => node !== null && (scrolls(node) || isInside(node.parentElement));
  const skipped = '.visually-hidden, .skip, svg, .plotbox';
  for (const node of document.querySelectorAll('body *')) {
    if (node.closest(skipped) || !node.checkVisibility({ visibilityProperty: true })) continue;
    const report = () => found.push(`${node.tagName}.${node.className}: ${node.textContent.slice(0, 60)}`);
    if (node.getBoundingClientRect().right > edge && !isInside(node)) report();
    const { overflowX, overflowY, textOverflow } = getComputedStyle(node);
    if (textOverflow === 'ellipsis' && node.title.includes(node.textContent.trim())) continue;
    const hides = (overflow) => overflow === 'hidden' || overflow === 'clip';
    if (node.textContent.trim() && !node.closest('progress, option')) {
      if (hides(overflowX) && node.scrollWidth > node.clientWidth + 1) report();
      else if (hides(overflowY) && node.scrollHeight > node.clientHeight + 1) report();
    }
  }
  return found;
}"""
"""Elements outside the window or clipped by their own box that cannot be scrolled to.

A text that ends with an ellipsis is allowed if its title has the whole of it.
"""

MOVING = """() => {
  const timed = (style) => parseFloat(style.transitionDuration) > 0.001 || parseFloat(style.animationDuration) > 0.001;
  const moves = (style) => style.scrollBehavior === 'smooth' || timed(style);
  const moving = [...document.querySelectorAll('*')].filter((node) => moves(getComputedStyle(node)));
  return [document.getAnimations().length, moving.map((node) => `${node.tagName}.${node.className}`)];
}"""

TWO_FRAMES = "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
"""The page hears of a new size with the next frame."""


class HeldRequests:
    """Keeps requests of a page from the service: those that it sends until ``holding`` is set to False."""

    def __init__(self, page: Page, address: str) -> None:
        self.page = page
        self.routes: list[Route] = []
        self.holding = True
        page.route(re.compile(address), self._take)

    def _take(self, route: Route) -> None:
        if self.holding:
            self.routes.append(route)
        else:
            route.continue_()

    def wait_for(self, count: int) -> None:
        """Return once so many requests have been held."""
        while len(self.routes) < count:
            self.page.wait_for_timeout(50)


def resize(page: Page, width: int, height: int) -> None:
    """Set the size of the window, and wait until the page has it: it travels apart from other commands."""
    page.set_viewport_size({"width": width, "height": height})
    page.wait_for_function("([width, height]) => innerWidth === width && innerHeight === height", arg=[width, height])
    page.evaluate(TWO_FRAMES)


def assert_no_overflow(page: Page) -> None:
    """Check a phone and a zoom of 200 %, where the window is half as wide: no horizontal scroll, nothing clipped."""
    for width, height in ((640, 400), (360, 800)):
        resize(page, width, height)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        overflowing = page.evaluate(OVERFLOWING)
        assert overflowing == [], (width, overflowing)
    resize(page, 1280, 800)


def assert_no_motion(page: Page) -> None:
    """Check that nothing moves for a user who prefers reduced motion."""
    page.emulate_media(reduced_motion="reduce")
    assert page.evaluate(MOVING) == [0, []]
    page.emulate_media(reduced_motion="null")


def check_both_themes(page: Page, name: str) -> None:
    for theme in ("light", "dark"):
        violations = axe_violations(page)
        assert violations == [], (theme, violations)
        take_screenshots(page, f"{name}-{theme}")
        # A script's click, because an open dialog covers the button.
        page.locator("#theme").evaluate("node => node.click()")
    assert_no_overflow(page)
    assert_no_motion(page)
