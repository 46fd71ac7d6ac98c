"""The failure card of a job: message, log tail, hint, and the buttons for the next actions."""

import json

import pytest

pytest.importorskip("playwright", reason="playwright is not installed")

from playwright.sync_api import Page, expect

from tests.browser.page_checks import check_both_themes
from tests.browser.test_submit_page import field
from tests.service.harness import ServiceHarness
from tests.service.live_server import served
from tests.service.test_checkpoints import write_checkpoint
from trainyard.contract.messages import ErrorCard
from trainyard.contract.status import Reason

pytestmark = pytest.mark.long

HINT = "Set training.batch_size to 16 and training.accumulation_steps to 16: the result is the same."


def test_failure_card_shows_next_actions_and_runs_them(rig: ServiceHarness, page: Page) -> None:
    job_id, attempt = rig.running(steps=1000, name="pre-12", training={"max_steps": 1000})
    for step in range(1, 101):
        attempt.metric(step, loss=8 - step / 20, memory_bytes=61_000_000_000)
    write_checkpoint(rig.checkpoint(job_id, attempt, 80))
    rig.ship(attempt)
    tail = [f"step {step} loss {8 - step / 20:.3f}" for step in range(87, 101)] + ["<b>CUDA out of memory</b>"]
    report = attempt.end("failed", Reason.OUT_OF_MEMORY, 100, "out of memory on rank 2 in step 101 with 32 rows")
    card = ErrorCard(code="out_of_memory", message=report.message, hint=HINT, rank=2, log_tail=tail)
    body = report.model_copy(update={"error": card}).model_dump(mode="json")
    assert rig.report(attempt, "exit", body).status_code == 200
    with served(rig) as (host, port):
        page.goto(f"http://{host}:{port}/jobs/{job_id}")
        shown = page.get_by_role("region", name="What went wrong")
        expect(page.locator(".sentence")).to_have_text("Out of memory on rank 2 in step 101 with 32 rows.")
        expect(shown.get_by_role("heading", name="out of memory on rank 2")).to_be_visible()
        expect(shown).to_contain_text(HINT)
        expect(shown).to_contain_text("61.0 GB")
        expect(shown.locator("pre")).to_have_text("\n".join(tail))
        expect(shown.get_by_role("listitem")).to_have_count(3)
        expect(shown).to_contain_text("--set training.batch_size=16 --set training.accumulation_steps=16")
        check_both_themes(page, "failed")
        log = shown.get_by_role("link", name="Read the log of rank 2")
        assert (log.get_attribute("href") or "").endswith("?tab=logs&attempt=1&rank=2&tail=50")
        shown.get_by_role("button", name="Fork from step 80 with batch_size 16").click()
        expect(field(page, "batch_size")).to_have_value("16")
        expect(field(page, "accumulation_steps")).to_have_value("16")
        assert json.loads(page.evaluate(f"sessionStorage.getItem('trainyard-draft-fork-{job_id}')")) == {
            "training": {"batch_size": 16, "accumulation_steps": 16}
        }
        page.go_back()
        shown.get_by_role("button", name="Resume from step 80").click()
        expect(page.locator(".job-title .status")).to_contain_text("queued")
        expect(shown).to_be_hidden()
