"""Held-out sets on the metrics tab and on the compare page."""

import re
from collections.abc import Iterator

import pytest

pytest.importorskip("playwright", reason="playwright is not installed")

from playwright.sync_api import Page, expect

from tests.browser.page_checks import check_both_themes
from tests.service.harness import ServiceHarness
from tests.service.live_server import served

pytestmark = pytest.mark.long

SETS = ("code", "zh")


@pytest.fixture
def jobs(rig: ServiceHarness) -> list[str]:
    """Two runs of 100 steps that evaluate two sets every 20 steps."""
    made = []
    for offset in (0.0, 0.5):
        job_id, attempt = rig.running(steps=100, name=f"run-{offset}", reporting={"eval_interval": 20})
        for step in range(1, 101):
            found = {}
            if step % 20 == 0:
                sets = {name: {"loss": 3.0 + i + offset - step / 100, "bpb": 1.0 + i} for i, name in enumerate(SETS)}
                found = {"eval": sets, "eval_loss": 3.5 + offset - step / 100, "eval_bpb": 1.5 + offset}
            attempt.metric(step, loss=4.0 - step / 100, tokens=step * 1000, bpb=1.75, **found)
        rig.ship(attempt)
        made.append(job_id)
    return made


@pytest.fixture
def address(rig: ServiceHarness, jobs: list[str]) -> Iterator[str]:
    with served(rig) as (host, port):
        yield f"http://{host}:{port}"


def test_the_metrics_tab_has_a_line_for_each_set(address: str, jobs: list[str], page: Page) -> None:
    broken: list[str] = []
    page.on("pageerror", lambda error: broken.append(str(error)))
    page.goto(f"{address}/jobs/{jobs[0]}?tab=metrics&chart=evaluation")
    panel = page.get_by_role("tabpanel")
    losses = panel.get_by_role("group", name=re.compile("^Evaluation loss"))
    expect(losses).to_have_attribute("aria-label", re.compile("now 2.500$"))
    losses.scroll_into_view_if_needed()
    expect(losses.locator(".scatterlayer .trace")).to_have_count(3)
    bits = panel.get_by_role("group", name=re.compile("^Bits per byte"))
    expect(bits).to_have_attribute("aria-label", re.compile("now 1.750$"))
    bits.scroll_into_view_if_needed()
    expect(bits.locator(".scatterlayer .trace")).to_have_count(4)
    assert bits.locator(".plot").evaluate("node => node.data.map((one) => [one.uid, one.x.length])") == [
        ["bpb", 100],
        ["eval_bpb", 5],
        ["set-code", 5],
        ["set-zh", 5],
    ]
    assert broken == []
    check_both_themes(page, "held-out")


def test_the_compare_page_compares_the_chosen_set(address: str, jobs: list[str], page: Page) -> None:
    broken: list[str] = []
    page.on("pageerror", lambda error: broken.append(str(error)))
    page.goto(f"{address}/compare?jobs={','.join(jobs)}")
    losses = page.get_by_role("group", name=re.compile("^Held-out loss"))
    expect(losses).to_have_attribute("aria-label", re.compile("^Held-out loss, .*now 2.500, 2 jobs$"))
    expect(losses.locator(".scatterlayer .trace")).to_have_count(2)
    bits = page.get_by_role("group", name=re.compile("^Held-out bits per byte"))
    expect(bits).to_have_attribute("aria-label", re.compile("now 1.500, 2 jobs$"))
    page.get_by_label("Held-out set").select_option("zh")
    expect(losses).to_have_attribute("aria-label", re.compile("^Held-out loss of zh, .*now 3.000, 2 jobs$"))
    expect(bits).to_have_attribute("aria-label", re.compile("now 2.000, 2 jobs$"))
    assert "set=zh" in page.url
    page.reload()
    expect(losses).to_have_attribute("aria-label", re.compile("^Held-out loss of zh"))
    expect(page.get_by_label("Held-out set")).to_have_value("zh")
    assert broken == []
