"""Scripts of other pages are loaded after the first page, and a script that cannot be loaded is reported."""

import pytest

pytest.importorskip("playwright", reason="playwright is not installed")

from playwright.sync_api import Page, expect

from tests.service.harness import ServiceHarness
from tests.service.live_server import served
from trainyard.service.dashboard.assets import STATIC

pytestmark = pytest.mark.long


def test_other_pages_are_loaded_in_idle_time(rig: ServiceHarness, page: Page) -> None:
    loaded: list[str] = []
    page.on("request", lambda request: loaded.append(request.url) if request.url.endswith(".js") else None)
    with served(rig) as (host, port):
        page.goto(f"http://{host}:{port}/system")
        expect(page.get_by_role("heading", name="System")).to_be_visible()
        page.wait_for_function("() => performance.getEntriesByType('resource').some((one) => "
                               "one.name.endsWith('/job/config-tab.js'))")  # fmt: skip
        began = page.evaluate("performance.getEntriesByType('resource').filter((one) => "
                              "one.name.endsWith('/pages/submit.js')).map((one) => one.startTime)")  # fmt: skip
        assert began[0] > 4000, "the first page does not wait for others"
        names = {url.partition("/ui/")[2].partition("/")[2] for url in loaded}
        assert {file.relative_to(STATIC).as_posix() for file in STATIC.rglob("*.js")} <= names
    # The service is down: a page that was never open can be opened.
    page.get_by_role("link", name="Submit").click()
    expect(page).to_have_title("Submit · Trainyard")


def test_a_page_that_cannot_be_loaded_says_so(rig: ServiceHarness, page: Page) -> None:
    with served(rig) as (host, port):
        page.route("**/pages/system.js", lambda route: route.abort())
        page.goto(f"http://{host}:{port}/system")
        expect(page.get_by_role("alert")).to_contain_text("could not be loaded")
        page.unroute("**/pages/system.js")
        page.get_by_role("button", name="Load again").click()
        expect(page.get_by_role("heading", name="System")).to_be_visible()


BLOCKED = """for (const name of ['localStorage', 'sessionStorage'])
  Object.defineProperty(window, name, {get() { throw new DOMException('blocked', 'SecurityError') }});"""
FULL = "Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError') };"


@pytest.mark.parametrize("fault", [BLOCKED, FULL], ids=["blocked", "full"])
def test_pages_work_without_the_browser_s_storage(rig: ServiceHarness, page: Page, fault: str) -> None:
    page.add_init_script(fault)
    rig.submit(name="kept")
    with served(rig) as (host, port):
        page.goto(f"http://{host}:{port}/")
        expect(page.get_by_role("link", name="kept").first).to_be_visible()
        page.get_by_role("button", name="Dark").click()
        page.get_by_role("link", name="System").click()
        expect(page.get_by_role("heading", name="Devices")).to_be_visible()
        expect(page.get_by_role("button", name="Light")).to_be_visible()
        page.get_by_role("link", name="Submit").click()
        page.get_by_label("name", exact=True).fill("draft")
        page.get_by_role("link", name="Jobs").click()
        page.get_by_role("link", name="Submit").click()
        expect(page.get_by_label("name", exact=True)).to_have_value("draft")
        page.get_by_role("button", name="中文").click()
        expect(page.locator("html")).to_have_attribute("lang", "zh-CN")
