"""Compare, System and Submit, light and dark, without serious findings of axe."""

import json
import re
from collections.abc import Iterator

import pytest

pytest.importorskip("playwright", reason="playwright is not installed")

from playwright.sync_api import Page, expect

from tests.browser.looks import in_both_themes
from tests.service.rig import Rig
from tests.service.served import served


@pytest.fixture
def service(rig: Rig) -> Iterator[str]:
    """Two jobs that differ in their learning rate, and one that waits."""
    for name, rate, offset in (("slow", 1e-4, 0.5), ("fast", 1e-3, 0.0)):
        _, attempt = rig.running(steps=60, name=name, training={"learning_rate": rate})
        for step in range(1, 61):
            attempt.metric(step, loss=8 - step / 12 + offset, tokens=step * 2048, learning_rate=rate)
        rig.ship(attempt)
        rig.exit(attempt, "completed", step=60)
    rig.running(steps=1000, name="holds-the-slots", resources={"nproc_per_node": 2})
    rig.submit(name="waits", resources={"nproc_per_node": 2})
    with served(rig) as (host, port):
        yield f"http://{host}:{port}"


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


def test_a_spec_is_planned_mended_and_submitted(service: str, rig: Rig, page: Page) -> None:
    page.goto(f"{service}/submit")
    field = page.get_by_label("Job spec")
    field.fill("{")
    page.get_by_role("button", name="Plan").click()
    expect(page.get_by_role("alert")).to_contain_text("not JSON")
    spec = rig.spec(name="from-the-page")
    field.fill(json.dumps({**spec, "training": {**spec.get("training", {}), "learning_rate": -1}}, indent=1))
    page.get_by_role("button", name="Plan").click()
    mistake = page.get_by_role("button", name="/training/learning_rate")
    mistake.click()
    assert field.evaluate("node => node.value.slice(node.selectionStart, node.selectionEnd)") == '"learning_rate"'
    field.fill(json.dumps(spec))
    page.get_by_role("button", name="Plan").click()
    expect(page.get_by_role("heading", name="What it would be")).to_be_visible()
    expect(mistake).to_have_count(0)
    in_both_themes(page, "submit")
    page.get_by_role("button", name="Submit").click()
    expect(page.get_by_role("heading", name="from-the-page")).to_be_visible()
    assert [job["name"] for job in rig.get("/jobs", name="from-the-page")["data"]] == ["from-the-page"]
