"""The logs tab: a million lines that are scrolled, followed while they grow, and searched."""

import re

import pytest

pytest.importorskip("playwright", reason="playwright is not installed")

from playwright.sync_api import Page, expect

from tests.browser.page_checks import check_both_themes
from tests.service.harness import ServiceHarness
from tests.service.live_server import served
from tests.service.test_log_reader import log

MANY = 1_000_000


@pytest.mark.long
def test_logs_tab_scrolls_follows_and_searches_a_million_lines(rig: ServiceHarness, page: Page) -> None:
    job_id, attempt = rig.running(steps=100, name="long", resources={"nproc_per_node": 2})
    attempt.metric(5)
    rig.ship(attempt)
    path = log(
        rig, job_id, "".join(f"step {i} loss {8 - i / MANY:.4f}\n" for i in range(1, MANY)) + "<b>the last</b>\n"
    )
    log(rig, job_id, "\x1b[32mrank one\x1b[0m here\n10 %\r90 %\n", rank=1)
    broken: list[str] = []
    page.on("pageerror", lambda error: broken.append(str(error)))
    with served(rig) as (host, port):
        page.goto(f"http://{host}:{port}/jobs/{job_id}?tab=logs")
        box = page.get_by_role("region", name="Log", exact=True)
        expect(box).to_contain_text("<b>the last</b>")
        expect(page.get_by_role("tabpanel")).to_contain_text("1,000,000 lines")
        assert box.locator(".line").count() < 150
        check_both_themes(page, "logs")
        with path.open("a") as file:
            file.write("and one more\n")
        expect(box).to_contain_text("and one more")
        box.evaluate("node => { node.scrollTop = node.scrollHeight / 2; }")
        expect(box.locator(".line .line-number", has_text=re.compile("^5000[0-9][0-9]$")).first).to_be_visible()
        expect(page.get_by_label("Follow")).not_to_be_checked()
        stays = box.evaluate("node => node.scrollTop")
        with path.open("a") as file:
            file.write("unseen\n")
        expect(page.get_by_role("tabpanel")).to_contain_text("1,000,002 lines")
        assert box.evaluate("node => node.scrollTop") == stays
        page.get_by_label("Search the whole log").fill("STEP 77777")
        found = page.get_by_role("region", name="Matching lines")
        expect(page.get_by_role("tabpanel")).to_contain_text("11 matching lines in 1,000,002")
        expect(found.locator("mark")).to_have_count(11)
        assert "grep=" in page.url
        check_both_themes(page, "logs-search")
        found.get_by_role("button", name="Show line 777777 in context").click()
        marked = box.locator(".line.highlighted")
        expect(marked).to_contain_text("step 777777 loss")
        expect(marked).to_be_in_viewport()
        page.reload()
        expect(marked).to_contain_text("step 777777 loss")
        page.get_by_label("Rank").select_option("1")
        expect(box).to_contain_text("rank one here")
        assert [one.inner_text() for one in box.locator(".line-text").all()] == ["rank one here", "90 %"]
        page.get_by_label("Rank").select_option("agent")
        expect(page.get_by_role("tabpanel")).to_contain_text("Nothing has been printed yet.")
    assert broken == []


def test_a_search_continues_after_a_lost_connection(rig: ServiceHarness, page: Page) -> None:
    job_id, attempt = rig.running(steps=100, name="long")
    attempt.metric(5)
    rig.ship(attempt)
    log(rig, job_id, "one\ntwo\nthree\n")
    page.route("**/logs/search**", lambda route: route.abort(), times=1)
    with served(rig) as (host, port):
        page.goto(f"http://{host}:{port}/jobs/{job_id}?tab=logs&grep=two")
        expect(page.get_by_role("tabpanel")).to_contain_text("1 matching line in 3")
