"""The tabs of a job: each has the whole height; what starts from a checkpoint or the curve; texts edited in place."""

import re
from typing import Any

import pytest

pytest.importorskip("playwright", reason="playwright is not installed")

from playwright.sync_api import Page, Position, expect
from sqlalchemy import insert

from tests.browser.page_checks import check_both_themes
from tests.browser.test_charts import figure
from tests.browser.test_job_actions import choose_of_row, job_named
from tests.browser.test_submit_page import field
from tests.browser.test_workspace import NOTIFICATIONS
from tests.service.harness import ServiceHarness
from tests.service.live_server import served
from tests.service.test_checkpoints import write_checkpoint
from tests.service.test_log_reader import log
from trainyard.service.db.models import EventRow

pytestmark = pytest.mark.long

HEIGHT = 800


def test_a_tab_has_the_whole_height_and_only_the_overview_fetches_curves(
    service: str, rig: ServiceHarness, page: Page
) -> None:
    job_id = job_named(rig, "fast")["id"]
    log(rig, job_id, "".join(f"step {step} loss 3\n" for step in range(500)))
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.set_viewport_size({"width": 1280, "height": HEIGHT})
    page.goto(f"{service}/jobs/{job_id}?tab=logs")
    box = page.get_by_role("region", name="Log", exact=True)
    expect(box).to_contain_text("step 499")
    place = box.bounding_box()
    assert place is not None
    assert place["y"] < HEIGHT / 2.5
    assert place["height"] > HEIGHT * 0.7
    assert figure(page, "Train loss").count() == 0
    assert [url for url in asked if "/metrics?" in url] == []
    check_both_themes(page, "logs-tab")
    page.get_by_role("tab", name="overview").click()
    expect(figure(page, "Train loss").locator(".nsewdrag").first).to_be_visible()
    expect(page.get_by_role("region", name="Attempts").get_by_role("row")).to_have_count(2)
    page.get_by_role("tab", name="metrics").click()
    expect(figure(page, "Perplexity").locator(".nsewdrag").first).to_be_visible()
    assert figure(page, "Train loss").count() == 0
    expect(page.get_by_label("X axis")).to_be_visible()
    page.get_by_role("tab", name="overview").click()
    expect(figure(page, "Train loss")).to_be_visible()
    expect(page.get_by_label("X axis")).to_have_count(1)


@pytest.mark.parametrize(
    ("name", "primary", "impossible"),
    [
        ("fast", "fork…", {"pause": "is succeeded", "resume": "finished", "kill": "is succeeded"}),
        ("holds-the-slots", "pause", {"resume": "running", "fork…": "no checkpoint", "delete": "cancel it first"}),
        ("waits", "pause", {"save now": "queued", "delete": "cancel it first"}),
    ],
)
def test_one_action_is_a_button_and_the_menu_has_the_reasons(
    service: str, rig: ServiceHarness, page: Page, name: str, primary: str, impossible: dict[str, str]
) -> None:
    job: dict[str, Any] = job_named(rig, name)
    page.goto(f"{service}/jobs/{job['id']}")
    buttons = page.get_by_role("group", name="Actions", exact=True).get_by_role("button")
    expect(buttons).to_have_text([primary, "More actions"])
    page.get_by_role("button", name="More actions").click()
    menu = page.get_by_role("group", name="More actions")
    for verb, reason in impossible.items():
        item = menu.get_by_role("button", name=re.compile(f"^{verb} ?"), disabled=True).first
        expect(item).to_contain_text(reason)
    listed = menu.get_by_role("button").count()
    menu.get_by_role("button", disabled=True).first.click(force=True)
    expect(menu.get_by_role("button")).to_have_count(listed)
    assert rig.job(job["id"])["desired"] == job["desired"], "nothing was requested"
    check_both_themes(page, f"actions-{name}")


def test_generate_and_resume_start_from_a_checkpoint_and_from_the_curve(
    service: str, rig: ServiceHarness, page: Page
) -> None:
    job_id = job_named(rig, "fast")["id"]
    page.goto(f"{service}/jobs/{job_id}?tab=checkpoints")
    row = page.get_by_role("row", name=re.compile("^20 "))
    row.get_by_role("button", name="More from step 20").click()
    expect(row.get_by_role("button", name="Evaluate")).to_contain_text("no tasks in evaluation.tasks")
    page.keyboard.press("Escape")
    choose_of_row(row, 20, "Resume with…")
    expect(page.get_by_role("dialog", name="Resume fast")).to_be_visible()
    expect(field(page, "step").locator("option:checked")).to_have_text("20")
    page.keyboard.press("Escape")
    row.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("tab", name="try")).to_have_attribute("aria-selected", "true")
    expect(page.get_by_label("Step", exact=True)).to_have_value("20")
    expect(page.get_by_label("Prompt")).to_be_focused()
    page.get_by_role("tab", name="overview").click()
    chart = figure(page, "Train loss")
    plot = chart.locator(".nsewdrag").first
    box = plot.bounding_box()
    assert box is not None
    # Between 30 and 40, so nearer to the checkpoint at 40.
    place: Position = {"x": 0.6 * box["width"], "y": 30}
    plot.click(button="right", position=place)
    menu = chart.locator(".menu-list")
    expect(menu).to_contain_text("Checkpoint at step 40")
    expect(menu.get_by_role("button")).to_contain_text(
        ["PNG", "SVG", "CSV", "Generate", "Fork from here", "Decay from here", "Resume with", "Evaluate", "Show it"]
    )
    check_both_themes(page, "curve-menu")
    menu.get_by_role("button", name="Decay from here").click()
    expect(page.get_by_role("dialog", name="Decay from step 40")).to_be_visible()
    page.keyboard.press("Escape")
    plot.click(button="right", position=place)
    menu.get_by_role("button", name="Show it in the list").click()
    marked = page.locator("tr.highlighted")
    expect(marked).to_contain_text("40")
    expect(marked.get_by_role("button", name="Generate")).to_be_focused()
    assert "at=40" in page.url


def test_an_admin_gives_a_job_to_another_owner_in_place(service: str, rig: ServiceHarness, page: Page) -> None:
    job_id = job_named(rig, "waits")["id"]
    page.goto(f"{service}/jobs/{job_id}")
    expect(page.get_by_text("owner local")).to_be_visible()
    expect(page.get_by_role("button", name="Change the owner")).to_be_hidden()
    assert rig.client.post("/tokens", json={"name": "alice", "scope": "submit"}).status_code == 201
    page.reload()
    page.get_by_role("button", name="Change the owner").click()
    expect(page.locator("#suggestions option")).to_have_count(2)
    page.get_by_label("owner", exact=True).fill("carol")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert").filter(has_text="no token")).to_be_visible()
    page.get_by_label("owner", exact=True).fill("alice")
    page.keyboard.press("Enter")
    expect(page.get_by_text("owner alice")).to_be_visible()
    assert rig.job(job_id)["owner"] == "alice"


def test_a_job_is_watched_and_hidden_from_lists_on_its_page(service: str, rig: ServiceHarness, page: Page) -> None:
    page.add_init_script(NOTIFICATIONS)
    done, going = (job_named(rig, name)["id"] for name in ("fast", "holds-the-slots"))
    page.goto(f"{service}/jobs/{done}")
    page.get_by_role("button", name="More actions").click()
    page.get_by_role("button", name="discard: hide from lists").click()
    expect(page.get_by_text("Hidden from lists")).to_be_visible()
    assert rig.job(done)["discarded"]
    expect(page.get_by_role("button", name="Notify me")).to_be_hidden()
    page.get_by_role("button", name="More actions").click()
    page.get_by_role("button", name="show in lists again").click()
    expect(page.get_by_text("Shown in lists again")).to_be_visible()
    assert not rig.job(done)["discarded"]
    page.goto(f"{service}/jobs/{going}")
    page.get_by_role("button", name="Notify me at the end").click()
    watched = page.get_by_role("button", name="Notifies me at the end")
    expect(watched).to_have_attribute("aria-pressed", "true")
    assert page.evaluate("window.asked") == 1
    page.reload()
    watched.click()
    expect(page.get_by_role("button", name="Notify me at the end")).to_have_attribute("aria-pressed", "false")
    assert page.evaluate("localStorage.getItem('trainyard-watched')") == "{}"


def test_description_and_group_are_edited_in_place(service: str, rig: ServiceHarness, page: Page) -> None:
    job_id = job_named(rig, "waits")["id"]
    page.goto(f"{service}/jobs/{job_id}")
    page.get_by_role("button", name="Add a description").click()
    page.keyboard.type("<b>why</b>")
    page.keyboard.press("Enter")
    page.keyboard.type("and so on")
    page.keyboard.press("Control+Enter")
    change = page.get_by_role("button", name="Change the description")
    expect(change).to_be_focused()
    expect(page.locator(".description")).to_have_text("<b>why</b>\nand so on")
    page.get_by_role("button", name="Add a group").click()
    page.get_by_label("group", exact=True).fill("x" * 300)
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert").filter(has_text="at most")).to_be_visible()
    page.get_by_label("group", exact=True).fill("sweep 1")
    page.keyboard.press("Enter")
    link = page.get_by_role("link", name="group sweep 1")
    expect(link).to_have_attribute("href", "/?group=sweep%201")
    expect(page.locator(".details")).to_contain_text("owner local")
    change.click()
    page.get_by_label("description", exact=True).fill("other")
    page.keyboard.press("Escape")
    job = rig.job(job_id)
    assert (job["description"], job["group"]) == ("<b>why</b>\nand so on", "sweep 1")
    check_both_themes(page, "details")
    link.click()
    expect(page.locator(".jobs tr")).to_have_count(1)


def test_long_lists_show_the_newest_events_and_offer_the_oldest_checkpoints(rig: ServiceHarness, page: Page) -> None:
    job_id, attempt = rig.running(steps=200, name="long")
    for step in range(1, 103):
        attempt.metric(step)
        write_checkpoint(rig.checkpoint(job_id, attempt, step))
    rig.ship(attempt)
    event = {"job_id": job_id, "attempt": 1, "kind": "warning", "actor": "agent", "data": {}, "at": rig.clock()}
    with rig.database.write() as session:
        session.execute(insert(EventRow), [{**event, "message": f"warning {number}"} for number in range(1000)])
    requested: list[str] = []
    page.on("request", lambda request: requested.append(request.url) if "/events" in request.url else None)
    with served(rig) as (host, port):
        address = f"http://{host}:{port}"
        page.goto(f"{address}/jobs/{job_id}?tab=events")
        first = page.get_by_role("region", name="Events").locator("tbody tr").first
        expect(first).to_contain_text("warning 999")
        with rig.database.write() as session:
            session.execute(insert(EventRow), {**event, "message": "the newest"})
        before = len(requested)
        attempt.metric(103)
        rig.ship(attempt)
        expect(first).to_contain_text("the newest")
        assert len(requested) <= before + 3, "only the new events are fetched"
        page.goto(f"{address}/submit?fork={job_id}&step=1")
        expect(page.get_by_label("From the checkpoint at step")).to_have_value("1")
        page.goto(f"{address}/jobs/{job_id}?tab=try&at=1")
        expect(page.get_by_label("Step", exact=True)).to_have_value("1")
