"""Compare and System, light and dark, without serious findings of axe."""

import re

import pytest

pytest.importorskip("playwright", reason="playwright is not installed")

from playwright.sync_api import Page, expect

from tests.browser.looks import in_both_themes


def test_jobs_over_each_other_with_the_settings_that_differ(service: str, page: Page) -> None:
    broken: list[str] = []
    page.on("pageerror", lambda error: broken.append(str(error)))
    page.goto(f"{service}/compare")
    page.get_by_label(re.compile("^slow ")).check()
    page.get_by_label(re.compile("^fast ")).check()
    assert page.evaluate("new URLSearchParams(location.search).get('jobs').split(',').length") == 2
    drawn = page.get_by_role("group", name=re.compile("^Train loss"))
    expect(drawn).to_have_attribute("aria-label", re.compile("2 jobs$"))
    expect(drawn.locator(".scatterlayer .trace")).to_have_count(2)
    differing = page.get_by_role("region", name="Differing settings")
    expect(differing.get_by_role("row")).to_have_count(2)
    expect(differing).to_contain_text("training.learning_rate")
    expect(differing).to_contain_text("0.0001")
    line = drawn.locator(".js-line").first
    before = line.evaluate("node => getComputedStyle(node).stroke")
    page.locator("#theme").click()
    expect(line).not_to_have_css("stroke", before)
    page.locator("#theme").click()
    in_both_themes(page, "compare")
    page.reload()
    expect(page.get_by_role("group", name=re.compile("^Train loss"))).to_have_attribute(
        "aria-label", re.compile("2 jobs$")
    )
    assert broken == []


def test_the_machine_and_its_queue(service: str, page: Page) -> None:
    page.goto(f"{service}/system")
    devices = page.get_by_role("region", name="Devices")
    expect(devices.get_by_role("row")).to_have_count(3)
    expect(devices.get_by_role("link", name="holds-the-slots")).to_have_count(2)
    queue = page.get_by_role("region", name="Queue")
    expect(queue).to_contain_text("waits")
    expect(queue.get_by_role("cell").last).not_to_be_empty()
    in_both_themes(page, "system")
