"""The job page in a real browser over a real socket, and the login."""

import re
from pathlib import Path

import pytest

pytest.importorskip("playwright", reason="playwright is not installed")

from playwright.sync_api import Page, expect

from tests.browser.page_checks import check_both_themes
from tests.service.harness import ServiceHarness
from tests.service.live_server import served

NAME = "<script>document.title = 'taken'</script>"


def test_job_page_from_the_list_to_a_pause(rig: ServiceHarness, page: Page) -> None:
    _, attempt = rig.running(steps=100, name=NAME)
    for step in range(1, 41):
        attempt.metric(step, loss=5 - step / 20)
    rig.ship(attempt)
    broken: list[str] = []
    page.on("pageerror", lambda error: broken.append(str(error)))
    with served(rig) as (host, port):
        page.goto(f"http://{host}:{port}/")
        expect(page.get_by_role("link", name=NAME)).to_be_visible()
        check_both_themes(page, "named")
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
        check_both_themes(page, "job")
        page.get_by_role("tab", name="events").click()
        expect(page.get_by_role("tabpanel")).to_contain_text("status")
        assert "tab=events" in page.url
        page.get_by_role("button", name="pause").click()
        expect(page.locator(".job-title .status")).to_contain_text("pausing")
    expect(page.locator("#offline")).to_be_visible()
    assert broken == []


def test_login_with_a_token_that_is_in_no_url(tmp_path: Path, page: Page) -> None:
    secret = "sesame-open"
    rig = ServiceHarness(tmp_path / "home", f"sqlite:///{tmp_path}/token.db", token=secret)
    addresses: list[str] = []
    page.on("request", lambda request: addresses.append(request.url))
    with served(rig) as (host, port):
        page.goto(f"http://{host}:{port}/")
        page.get_by_label("Token", exact=True).fill("wrong")
        page.get_by_role("button", name="Enter").click()
        expect(page.get_by_text("That token was not accepted.")).to_be_visible()
        page.get_by_label("Token", exact=True).fill(secret)
        page.get_by_role("button", name="Enter").click()
        expect(page.get_by_role("heading", name="No job yet")).to_be_visible()
        expect(page.locator(".command pre").last).to_contain_text("$TRAINYARD_TOKEN")
        page.get_by_role("link", name="System").click()
        expect(page.get_by_role("region", name="Devices")).to_be_visible()
        assert secret not in page.content()
    assert len(addresses) > 10
    assert [address for address in addresses if secret in address] == []
    rig.close()
    rig.database.close()
