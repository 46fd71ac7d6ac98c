"""The page of the API: Swagger UI from the service itself, under its content security policy."""

from pathlib import Path

import pytest

pytest.importorskip("playwright", reason="playwright is not installed")

from playwright.sync_api import Page, expect

from tests.service.harness import ServiceHarness
from tests.service.live_server import served

pytestmark = pytest.mark.long

TOKEN = "the-operator's-own"


def test_every_call_is_shown_without_a_request_to_another_host(rig: ServiceHarness, page: Page) -> None:
    requested: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    calls = sum(len(found) for found in rig.app.openapi()["paths"].values())
    with served(rig) as (host, port):
        page.goto(f"http://{host}:{port}/docs")
        expect(page.locator(".swagger-ui .opblock")).to_have_count(calls)
        page.locator("#operations-jobs-submitJob .opblock-summary-control").click()
        expect(page.locator("#operations-jobs-submitJob .opblock-description")).to_contain_text("Submit a job")
        page.get_by_role("link", name="Jobs", exact=True).click()
        expect(page.get_by_role("heading", name="No job yet")).to_be_visible()
    elsewhere = [url for url in requested if not url.startswith((f"http://{host}:{port}/", "data:"))]
    assert elsewhere == []


def test_a_call_is_tried_with_the_token_of_the_tab(tmp_path: Path, page: Page) -> None:
    rig = ServiceHarness(tmp_path / "home", f"sqlite:///{tmp_path}/trainyard.db", token=TOKEN)
    with served(rig) as (host, port):
        page.goto(f"http://{host}:{port}/docs")
        page.get_by_label("Token", exact=True).fill(TOKEN)
        page.get_by_label("Token", exact=True).press("Enter")
        version = page.locator("#operations-service-getVersion")
        version.locator(".opblock-summary-control").click()
        version.get_by_role("button", name="Try it out").click()
        version.get_by_role("button", name="Execute").click()
        expect(version.locator(".live-responses-table td.response-col_status").last).to_contain_text("200")
    rig.close()
    rig.database.close()
