"""The compare page: curves of several jobs, forks, and differing settings."""

import re
from typing import Any

import pytest

pytest.importorskip("playwright", reason="playwright is not installed")

from playwright.sync_api import Page, expect

from tests.browser.page_checks import HeldRequests, check_both_themes
from tests.browser.test_charts import drag
from tests.service.harness import ServiceHarness
from tests.service.live_server import served
from tests.service.test_checkpoints import write_checkpoint

pytestmark = pytest.mark.long


def test_compare_page_shows_curves_and_differing_settings(service: str, page: Page) -> None:
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
    expect(differing).to_contain_text("1e-4")
    line = drawn.locator(".js-line").first
    before = line.evaluate("node => getComputedStyle(node).stroke")
    page.locator("#theme").click()
    expect(line).not_to_have_css("stroke", before)
    page.locator("#theme").click()
    check_both_themes(page, "compare")
    page.reload()
    expect(page.get_by_role("group", name=re.compile("^Train loss"))).to_have_attribute(
        "aria-label", re.compile("2 jobs$")
    )
    assert broken == []


def test_a_choice_stays_while_an_older_list_is_under_way(service: str, page: Page) -> None:
    page.goto(f"{service}/compare")
    box = page.get_by_label(re.compile("^slow "))
    expect(box).to_be_visible()
    held = HeldRequests(page, r"/jobs\?")
    held.wait_for(1)
    box.check()
    # The list of that request is drawn, and the next one is held too.
    held.routes[0].continue_()
    held.wait_for(2)
    assert box.is_checked()
    held.holding = False
    held.routes[1].continue_()
    expect(page.get_by_role("group", name=re.compile("^Train loss"))).to_have_attribute(
        "aria-label", re.compile("1 job$")
    )
    assert box.is_checked()


def lines(page: Page) -> dict[str, list[float]]:
    """Return the first and last x value of each line of the loss chart, by name."""
    found: list[tuple[str, list[float]]] = page.locator(".plot").first.evaluate(
        "node => node.data.map((one) => [one.uid, [one.x[0], one.x.at(-1)]])"
    )
    return dict(found)


def labels(page: Page) -> list[list[Any]]:
    """Return text and position of the labels at the line ends of the loss chart."""
    found: list[list[Any]] = page.locator(".plot").first.evaluate(
        "node => node.layout.annotations.map((one) => [one.text, one.xref, one.x])"
    )
    return found


def test_a_forks_curve_starts_on_its_parents(rig: ServiceHarness, page: Page) -> None:
    parent, attempt = rig.running(steps=60, name="parent", training={"max_steps": 60})
    for step in range(1, 61):
        attempt.metric(step, loss=8 - step / 12, tokens=step * 100)
    write_checkpoint(rig.checkpoint(parent, attempt, 20))
    rig.ship(attempt)
    rig.exit(attempt, "completed", step=60)
    body = {"step": 20, "overrides": {"name": "<u>fork</u>", "training": {"learning_rate": 1e-4}}}
    fork = rig.client.post(f"/jobs/{parent}/fork", json=body).json()["id"]
    own = rig.next_attempt(fork, 1, start_step=20, steps=60)
    for step in range(21, 51):
        own.metric(step, loss=6 - step / 10, tokens=step * 100)
    rig.ship(own)
    with served(rig) as (host, port):
        page.goto(f"http://{host}:{port}/compare?jobs={parent},{fork},job_gone")
        loss = page.get_by_role("group", name=re.compile("^Train loss"))
        expect(loss).to_have_attribute("aria-label", re.compile("2 jobs$"))
        expect(loss.locator(".scatterlayer .trace")).to_have_count(3)
        assert lines(page) == {parent: [100, 6000], f"{fork}-joint": [2000, 2000], fork: [2000, 5000]}
        expect(page.get_by_text("Not found: job_gone")).to_be_visible()
        expect(page.locator(".legend")).to_contain_text("<u>fork</u>")
        expect(page.locator(".legend")).to_contain_text("forked at step 20")
        assert labels(page) == [["&lt;u&gt;fork&lt;/u&gt;", "x", 5000], ["parent", "paper", 1]], "at the lines' ends"
        check_both_themes(page, "fork-compared")
        expect(loss.locator(".nsewdrag").first).to_be_visible()
        drag(page, loss, 0.4, 0.6)
        page.wait_for_url(re.compile("zoom="))
        # Finer rows of a slightly wider range; the fork's start after its circle.
        page.wait_for_function(
            "id => document.querySelector('.plot').data.find((one) => one.uid === id).x[0] > 100", arg=parent
        )
        begin, end = lines(page)[parent]
        assert 1500 < begin < end < 4500
        assert [name for name, xref, _ in labels(page) if xref == "paper"] == ["&lt;u&gt;fork&lt;/u&gt;", "parent"]
        loss.get_by_role("button", name="whole run").click()
        page.wait_for_function(
            "id => document.querySelector('.plot').data.find((one) => one.uid === id).x[0] === 100", arg=parent
        )
        page.get_by_text("Jobs", exact=True).last.click()
        page.get_by_label("Find").fill("parent")
        page.get_by_label(re.compile("^parent ")).uncheck()
        expect(loss).to_have_attribute("aria-label", re.compile("1 job$"))
        assert lines(page) == {
            f"{fork}-before": [100, 2000], f"{fork}-joint": [2000, 2000], fork: [2000, 5000]}  # fmt: skip
