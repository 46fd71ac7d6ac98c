"""The evaluations tab: charts and a table of scores on tasks; and the same scores on the Compare page."""

import re

import pytest

pytest.importorskip("playwright", reason="playwright is not installed")

from playwright.sync_api import Page, expect

from tests.browser.page_checks import check_both_themes
from tests.service.harness import ServiceHarness
from tests.service.live_server import served
from tests.service.test_evaluations import report_score

pytestmark = pytest.mark.long


def test_scores_are_drawn_listed_and_compared(rig: ServiceHarness, page: Page) -> None:
    jobs = []
    for name, gain in (("first", 0.02), ("second", 0.03)):
        job_id, attempt = rig.running(steps=200, name=name, resources={"device": "cpu"})
        for step in range(20, 101, 20):
            attempt.metric(step)
            report_score(attempt, step, "arc", 0.25 + gain * step / 20)
            report_score(attempt, step, "facts", 0.5, task_kind="continuation", acc_norm=None)
        rig.ship(attempt)
        jobs.append((job_id, attempt))
    broken: list[str] = []
    page.on("pageerror", lambda error: broken.append(str(error)))
    with served(rig) as (host, port):
        job_id, attempt = jobs[0]
        page.goto(f"http://{host}:{port}/jobs/{job_id}?tab=evaluations")
        table = page.get_by_role("region", name="Scores on tasks, newest step first")
        expect(table.get_by_role("row")).to_have_count(11)
        expect(table.get_by_role("row").nth(2).get_by_role("cell").nth(2)).to_have_text("35.0 %")
        accuracy = page.get_by_role("group", name=re.compile("^Accuracy, newest"))
        expect(accuracy).to_have_attribute("aria-label", "Accuracy, newest: arc 35.0 %, facts 50.0 %")
        expect(accuracy.locator(".scatterlayer .trace")).to_have_count(2)
        check_both_themes(page, "evaluations")
        attempt.metric(120)
        report_score(attempt, 120, "arc", 0.41)
        rig.ship(attempt)
        expect(table.get_by_role("row").nth(1).get_by_role("cell").nth(2)).to_have_text("41.0 %")

        page.goto(f"http://{host}:{port}/compare?jobs={','.join(job for job, _ in jobs)}")
        scores = page.get_by_role("region", name="Scores on tasks")
        expect(scores.get_by_role("columnheader")).to_have_text(["Task", "first", "second"])
        expect(scores.get_by_role("row").nth(1).get_by_role("cell")).to_have_text(
            [
                "acc 41.0 %, acc_norm 25.0 %, bpb 1.500, step 120",
                "acc 40.0 %, acc_norm 25.0 %, bpb 1.500, step 100",
            ]
        )
    assert broken == []
