"""Login with a named token: a read token shows everything and gets an error for actions."""

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("playwright", reason="playwright is not installed")

from playwright.sync_api import Page, expect

from tests.browser.page_checks import TWO_FRAMES, HeldRequests, check_both_themes
from tests.service.harness import ServiceHarness
from tests.service.live_server import served
from tests.service.test_auth import bearer, created

OPERATOR = "the-operator's-own"


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[ServiceHarness]:
    made = ServiceHarness(tmp_path / "home", f"sqlite:///{tmp_path}/trainyard.db", token=OPERATOR)
    made.client.headers["Authorization"] = f"Bearer {OPERATOR}"
    yield made
    made.close()
    made.database.close()


def test_a_read_token_logs_in_and_may_not_pause(rig: ServiceHarness, page: Page) -> None:
    reader, submitter = created(rig, "reader"), created(rig, "submitter", scope="operate")
    job_id, _ = rig.running(name="mine")
    with served(rig) as (host, port):
        page.goto(f"http://{host}:{port}/jobs/{job_id}")
        field = page.get_by_label("Token", exact=True)
        field.fill("wrong")
        field.press("Enter")
        expect(page.locator("#token-error")).to_be_visible()
        check_both_themes(page, "login")
        page.get_by_label("Token", exact=True).fill(reader)
        page.get_by_label("Token", exact=True).press("Enter")
        expect(page.get_by_role("heading", name="mine")).to_be_visible()
        page.get_by_role("button", name="pause").click()
        expect(page.get_by_text("This needs the scope submit; the token reader has read.")).to_be_visible()
        assert rig.job(job_id)["status"] == "running"
        page.evaluate("token => sessionStorage.setItem('trainyard-token', token)", submitter)
        page.reload()
        page.get_by_role("button", name="pause").click()
        expect(page.locator(".job-title .status")).to_contain_text("pausing")
        rig.client.delete("/tokens/submitter")
        page.reload()
        expect(page.get_by_label("Token", exact=True)).to_be_visible()
    actors = [event["actor"] for event in rig.data(job_id, "events") if event["data"].get("to") == "pausing"]
    assert actors == ["submitter"]
    assert rig.client.get("/jobs", headers=bearer(submitter)).status_code == 401


def test_a_late_response_to_a_request_without_a_token_does_not_log_out(rig: ServiceHarness, page: Page) -> None:
    reader = created(rig, "reader")
    with served(rig) as (host, port):
        page.goto(f"http://{host}:{port}/")
        field = page.get_by_label("Token", exact=True)
        expect(field).to_be_visible()
        # The page continues to poll while the form is shown.
        held = HeldRequests(page, r"/jobs\?")
        held.wait_for(1)
        held.holding = False
        field.fill(reader)
        field.press("Enter")
        expect(page.get_by_role("heading", name="No job yet")).to_be_visible()
        with page.expect_response(lambda response: response.status == 401):
            held.routes[0].continue_()
        page.evaluate(TWO_FRAMES)
        assert field.count() == 0
        assert page.evaluate("sessionStorage.getItem('trainyard-token')") == reader
