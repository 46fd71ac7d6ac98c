"""The jobs page (search, filters, paging, queue) and the system page (devices, queue, disks)."""

import re
from pathlib import Path

import pytest

pytest.importorskip("playwright", reason="playwright is not installed")

from playwright.sync_api import Locator, Page, expect

from tests.browser.page_checks import check_both_themes
from tests.service.harness import ServiceHarness
from tests.service.live_server import served
from trainyard.service.devices import xids
from trainyard.service.devices.inventory import Device
from trainyard.service.devices.xids import XidError


def rows(page: Page) -> Locator:
    return page.locator(".jobs tr")


def names(page: Page) -> list[str]:
    return rows(page).locator(".name").all_text_contents()


def test_empty_jobs_page_shows_commands(rig: ServiceHarness, page: Page) -> None:
    with served(rig) as (host, port):
        page.goto(f"http://{host}:{port}/")
        expect(page.get_by_role("heading", name="No job yet")).to_be_visible()
        expect(page.locator(".command pre")).to_have_count(3)
        expect(page.locator(".command pre").last).to_contain_text(f"http://{host}:{port}/jobs")
        check_both_themes(page, "empty")


def test_jobs_page_keeps_search_and_filters_in_the_url(service: str, rig: ServiceHarness, page: Page) -> None:
    for i in range(3):
        rig.submit(name=f"more-{i}", labels={"team": "nlp", "size": str(i)})
    rig.reconcile()
    page.goto(service)
    expect(rows(page)).to_have_count(7)
    waits = rows(page).filter(has=page.get_by_role("link", name="waits"))
    expect(waits).to_contain_text("position 1")
    expect(page.locator(".queue li")).to_have_count(4)
    expect(page.locator(".queue li").first).to_contain_text("waits for 2 CPU slots; 0 of 2 free")
    curve = rows(page).filter(has_text="fast").locator(".spark polyline")
    expect(curve).to_have_attribute("points", re.compile(r"^1\.0,"))
    check_both_themes(page, "jobs")
    page.get_by_label("Search").fill("MORE")
    expect(rows(page)).to_have_count(3)
    rows(page).get_by_role("link", name="team=nlp").first.click()
    expect(page.get_by_role("button", name="Remove filter team=nlp")).to_be_visible()
    page.get_by_label("Label").fill("nonsense")
    page.get_by_label("Label").press("Enter")
    expect(page.get_by_label("Label")).to_have_attribute("aria-invalid", "true")
    page.get_by_label("Label").fill("size=1")
    page.get_by_label("Label").press("Enter")
    expect(rows(page)).to_have_count(1)
    page.get_by_label("Status").select_option("succeeded")
    expect(page.get_by_text("No job matches")).to_be_visible()
    page.get_by_label("Status").select_option("active")
    expect(rows(page)).to_have_count(1)
    page.reload()
    expect(rows(page)).to_have_count(1)
    assert names(page) == ["more-1"]
    page.get_by_role("button", name="Remove filter size=1").click()
    expect(page.get_by_label("Label")).to_be_focused()
    expect(rows(page)).to_have_count(3)


def test_system_page_shows_devices_queue_and_disks(tmp_path: Path, sqlite_home: str, page: Page) -> None:
    gigabyte = 1 << 30
    cards = (
        Device("cuda:0", "cuda", "NVIDIA Test", 80 * gigabyte, 61 * gigabyte, temperature_celsius=64),
        Device("cuda:1", "cuda", "NVIDIA Test", 80 * gigabyte, 3 * gigabyte, (4242,), (4242,), 38),
        Device("cpu:0", "cpu"),
        Device("cuda:2", "cuda", "NVIDIA Test", uuid="GPU-c", numa_node=1, link="nvlink", nvlink_peers=("cuda:3",)),
    )
    rig = ServiceHarness(tmp_path / "cards", sqlite_home, devices=cards)
    with rig.database.write() as session:
        xids.store(session, [XidError("GPU-c", 79, rig.clock())])
    rig.running(steps=10, name="<b>holds</b>")
    rig.submit(name="waits", resources={"priority": 5})
    rig.reconcile()
    with served(rig) as (host, port):
        page.goto(f"http://{host}:{port}/system")
        devices = page.get_by_role("region", name="Devices")
        first, second, cpu, faulty = (devices.get_by_role("row", name=card.id) for card in cards)
        expect(first.get_by_role("link", name="<b>holds</b>")).to_be_visible()
        expect(first).to_contain_text("65.5 GB of 85.9 GB")
        expect(first).to_contain_text("64 °C")
        expect(second).to_contain_text("not leased: in use")
        expect(second).to_contain_text("pid 4242")
        expect(cpu).to_contain_text("free")
        expect(page.get_by_text("1 of 4 free")).to_be_visible()
        expect(faulty).to_contain_text("NVLink to cuda:3 · NUMA node 1")
        expect(faulty).to_contain_text("XID 79: not leased until it is cleared")
        queue = page.get_by_role("region", name="Queue")
        expect(queue.get_by_role("row").last).to_contain_text("1waits51 GPU; 0 of 3 free, and cuda:2 with XID errors")
        disks = page.get_by_role("region", name="Disks")
        expect(disks.get_by_role("row").last).to_contain_text(str(tmp_path / "cards"))
        expect(disks.get_by_role("row").last).to_contain_text("✓ ok")
        expect(page.locator(".health-parts")).to_contain_text("✗ scheduler does not run")
        check_both_themes(page, "system")
        faulty.get_by_role("button", name="Clear").click()
        expect(faulty).not_to_contain_text("XID 79")
    rig.close()
    rig.database.close()


@pytest.fixture
def sqlite_home(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/cards.db"


def test_jobs_page_sorts_by_any_column_and_hides_discarded_jobs(rig: ServiceHarness, page: Page) -> None:
    job_id = ""
    for number, (name, score) in enumerate((("b", 3.0), ("c", 1.0), ("a", 2.0))):
        job_id, attempt = rig.running(steps=4, name=name, group="sweep" if number else "other", description="why\nso")
        attempt.metric(1 + number, loss=9.0 - score, eval_loss=score)
        rig.ship(attempt)
        rig.exit(attempt, "completed", step=4)
    waits = rig.submit(name="waits")
    with served(rig) as (host, port):
        page.goto(f"http://{host}:{port}/")
        expect(rows(page)).to_have_count(4)
        assert names(page) == ["waits", "a", "c", "b"]
        head = page.get_by_role("region", name="Jobs").get_by_role("columnheader")

        def sort_by(column: str, expected: str, order: str | None) -> None:
            header = head.filter(has_text=column)
            header.get_by_role("button").click()
            if order is None:
                expect(header).not_to_have_attribute("aria-sort", re.compile("."))
            else:
                expect(header).to_have_attribute("aria-sort", order)
            expect(rows(page).locator(".name")).to_have_text(expected.split())

        sort_by("Score", "c a b waits", "ascending")
        sort_by("Score", "b a c waits", "descending")
        sort_by("Score", "waits a c b", None)
        sort_by("Job", "a b c waits", "ascending")
        sort_by("Loss", "b a c waits", "ascending")
        sort_by("Progress", "a c b waits", "ascending")
        sort_by("Group", "b a c waits", "ascending")
        sort_by("Group", "a c b waits", "descending")
        page.reload()
        expect(rows(page).locator(".name")).to_have_text(["a", "c", "b", "waits"])
        sort_by("Score", "c a b waits", "ascending")
        expect(rows(page).first).to_contain_text("1.000")
        rows(page).get_by_role("link", name="sweep").first.click()
        expect(rows(page)).to_have_count(2)
        rig.client.patch(f"/jobs/{job_id}", json={"discarded": True})
        expect(rows(page)).to_have_count(1)
        page.get_by_label("Discarded").check()
        expect(rows(page).locator(".name")).to_have_text(["a"])
        page.get_by_label("Discarded").uncheck()
        page.get_by_label("Group").select_option("")
        expect(rows(page)).to_have_count(3)
        check_both_themes(page, "jobs-sorted")

        page.goto(f"http://{host}:{port}/jobs/{waits}")
        page.get_by_role("button", name="Edit").click()
        page.get_by_label("description", exact=True).fill("one\ntwo")
        page.get_by_label("group", exact=True).fill("sweep")
        page.get_by_label("discarded", exact=True).check()
        page.get_by_role("button", name="Save", exact=True).click()
        expect(page.get_by_role("button", name="Save", exact=True)).to_have_count(0)
        job = rig.job(waits)
        assert (job["description"], job["group"], job["discarded"]) == ("one\ntwo", "sweep", True)
