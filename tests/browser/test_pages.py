"""The pages in a real browser, over a service on a real socket."""

import re

import pytest

pytest.importorskip("playwright", reason="playwright is not installed")

from playwright.sync_api import Page, expect

from tests.browser.looks import in_both_themes
from tests.service.rig import Rig
from tests.service.served import served

NAME = "<script>document.title = 'taken'</script>"


def test_a_job_from_the_list_to_its_end(rig: Rig, page: Page) -> None:
    _, attempt = rig.running(steps=100, name=NAME)
    for step in range(1, 41):
        attempt.metric(step, loss=5 - step / 20)
    rig.ship(attempt)
    broken: list[str] = []
    page.on("pageerror", lambda error: broken.append(str(error)))
    with served(rig) as (host, port):
        page.goto(f"http://{host}:{port}/")
        expect(page.get_by_role("link", name=NAME)).to_be_visible()
        in_both_themes(page, "jobs")
        page.get_by_role("link", name=NAME).click()
        expect(page.get_by_role("heading", name=NAME)).to_be_visible()
        assert "taken" not in (page.title().removeprefix(NAME))
        expect(page.get_by_role("group", name="Train loss")).to_have_attribute(
            "aria-label", re.compile("Train loss, step 1 to 40, now 3")
        )
        for step in range(41, 51):
            attempt.metric(step, loss=5 - step / 20)
        rig.ship(attempt)
        expect(page.locator(".facts")).to_contain_text("50 of 100")
        in_both_themes(page, "job")
        page.get_by_role("tab", name="events").click()
        expect(page.get_by_role("tabpanel")).to_contain_text("status")
        assert "tab=events" in page.url
        page.get_by_role("button", name="pause").click()
        expect(page.locator(".who .status")).to_contain_text("pausing")
    expect(page.locator("#away")).to_be_visible()
    assert broken == []
