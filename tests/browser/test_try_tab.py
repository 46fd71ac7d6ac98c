"""The try tab: a text is shown while it is generated, and can be stopped."""

import pytest

pytest.importorskip("playwright", reason="playwright is not installed")

from playwright.sync_api import Page, expect

from tests.browser.page_checks import check_both_themes
from tests.service.harness import ServiceHarness
from tests.service.test_checkpoints import saved
from tests.service.test_generation import generation, live, until
from tests.service.test_generation import program as program


def test_a_text_is_shown_while_it_is_generated(rig: ServiceHarness, page: Page) -> None:
    job_id, _ = saved(rig, 10, 20, name="writer")
    with live(rig) as (host, port):
        page.goto(f"http://{host}:{port}/jobs/{job_id}")
        page.get_by_role("tab", name="try").click()
        page.get_by_label("Prompt").fill("<b>hello</b>")
        page.get_by_label("Step", exact=True).select_option("10")
        page.get_by_role("button", name="Generate").click()
        text = page.get_by_label("Generated text")
        expect(text).to_have_text("<b>hello</b>\u4e2d<B>HELLO</B>")
        expect(page.get_by_text("2 tokens by step 10 on cpu, ended by itself")).to_be_visible()
        check_both_themes(page, "try")
        page.get_by_label("Prompt").fill("slow")
        page.get_by_role("button", name="Generate").click()
        expect(text).to_contain_text("slowxxxx")
        page.get_by_role("button", name="Stop").click()
        expect(page.get_by_text("Stopped.")).to_be_visible()
        until(lambda: generation(rig).requests == 0)
        page.get_by_label("Prompt").fill("long")
        page.get_by_role("button", name="Generate").click()
        expect(page.get_by_role("alert").filter(has_text="/prompt: is too long")).to_be_visible()


def test_without_a_checkpoint_there_is_nothing_to_try(rig: ServiceHarness, page: Page) -> None:
    job_id, _ = rig.running()
    with live(rig) as (host, port):
        page.goto(f"http://{host}:{port}/jobs/{job_id}?tab=try")
        expect(page.get_by_text("No checkpoint yet.")).to_be_visible()
        expect(page.get_by_role("button", name="Generate")).to_be_hidden()
