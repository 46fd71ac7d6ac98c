"""The samples tab: generated texts by prompt and step."""

import pytest

pytest.importorskip("playwright", reason="playwright is not installed")

from playwright.sync_api import Page, expect

from tests.browser.page_checks import check_both_themes
from tests.service.harness import ServiceHarness
from tests.service.live_server import served

PROMPTS = ("Once upon a time", "<b>def</b> main():")


def test_samples_tab_shows_prompts_by_step(rig: ServiceHarness, page: Page) -> None:
    job_id, attempt = rig.running(steps=200, name="writer")
    for step in range(10, 121, 10):
        attempt.metric(step)
        for prompt in PROMPTS:
            attempt.say(
                "sample", step=step, prompt=prompt, text=f"{prompt} there was a <i>cat</i>\nof {step} steps " * 3
            )
    rig.ship(attempt)
    with served(rig) as (host, port):
        page.goto(f"http://{host}:{port}/jobs/{job_id}?tab=samples")
        table = page.get_by_role("region", name="Samples")
        expect(table.get_by_role("columnheader")).to_have_text(
            ["Prompt", "step 120", "step 100", "step 80", "step 50", "step 30", "step 10"]
        )
        expect(table.get_by_role("rowheader")).to_have_text(list(PROMPTS))
        expect(table.get_by_role("row").nth(2).get_by_role("cell").first).to_contain_text("<i>cat</i> of 120 steps")
        check_both_themes(page, "samples")
        page.get_by_role("button", name="All 12 steps").click()
        expect(table.get_by_role("columnheader")).to_have_count(13)
        attempt.metric(130)
        attempt.say("sample", step=130, prompt=PROMPTS[0], text="the newest")
        rig.ship(attempt)
        expect(table.get_by_role("columnheader").nth(1)).to_have_text("step 130")
        expect(table.get_by_role("row").nth(1).get_by_role("cell").first).to_have_text("the newest")
        expect(table.get_by_role("row").nth(2).get_by_role("cell").first).not_to_contain_text("step")
