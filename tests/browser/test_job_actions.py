"""Actions on the job page: edit, resume, kill, save, export, fork, and where an error is shown."""

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright", reason="playwright is not installed")

from playwright.sync_api import Locator, Page, Route, expect

from tests.browser.page_checks import check_both_themes
from tests.browser.test_submit_page import field, field_error
from tests.service.harness import ServiceHarness
from tests.service.test_checkpoints import MODEL
from tests.service.test_exports import exporter
from trainyard.service.exports import subprocess as export_process
from trainyard.service.jobs import repository

__all__ = ["exporter"]


def job_named(rig: ServiceHarness, name: str) -> dict[str, Any]:
    """Return the only job with this name."""
    [found] = rig.get("/jobs", name=name)["data"]
    job: dict[str, Any] = found
    return job


def choose(page: Page, verb: str) -> None:
    """Choose an action in the menu of the job."""
    page.get_by_role("button", name="More actions").click()
    page.get_by_role("group", name="More actions").get_by_role("button", name=verb, exact=True).click()


def choose_of_row(row: Locator, step: int, words: str) -> None:
    """Choose an action in the menu of a checkpoint's row."""
    row.get_by_role("button", name=f"More from step {step}").click()
    row.get_by_role("button", name=words).click()


def one_epoch_of(rig: ServiceHarness, job_id: str, steps: int) -> None:
    """Store that an epoch of the job has ``steps`` steps, as its schedule needs."""
    with rig.database.write() as session:
        row = repository.find(session, job_id)
        row.facts = {**row.facts, "steps_per_epoch": steps}


def test_nothing_can_be_edited_until_the_job_is_known(service: str, rig: ServiceHarness, page: Page) -> None:
    job_id = job_named(rig, "waits")["id"]
    held: list[Route] = []
    released = False

    def hold(route: Route) -> None:
        if released or route.request.resource_type == "document":
            route.continue_()
        else:
            held.append(route)

    page.route(lambda url: url.endswith(f"/jobs/{job_id}"), hold)
    page.goto(f"{service}/jobs/{job_id}")
    expect(page.get_by_role("heading", name=job_id)).to_be_visible()
    expect(page.get_by_role("button", name="Edit")).to_be_hidden()
    released = True
    for route in held:
        route.continue_()
    page.get_by_role("button", name="Edit").click()
    expect(field(page, "name")).to_have_value("waits")


def test_edit_form_saves_and_shows_concurrent_changes(service: str, rig: ServiceHarness, page: Page) -> None:
    job_id = job_named(rig, "waits")["id"]
    page.goto(f"{service}/jobs/{job_id}")
    expect(page.locator(".jobs-ahead")).to_have_text("Jobs ahead: holds-the-slots.")
    page.get_by_role("button", name="Edit").click()
    expect(field(page, "name")).to_be_focused()
    field(page, "priority").fill("1001")
    page.get_by_role("button", name="Add a label").click()
    page.keyboard.type("team")
    page.keyboard.press("Tab")
    page.keyboard.type("<b>nlp</b>")
    page.get_by_role("button", name="Save", exact=True).click()
    expect(field_error(page, "priority")).to_contain_text("less than or equal to 1000")
    expect(field(page, "priority")).to_be_focused()
    field(page, "priority").fill("7")
    # Another client changes both: an unedited field takes the new value, an edited one keeps its value and reports it.
    rig.client.patch(f"/jobs/{job_id}", json={"name": "renamed", "priority": 3})
    expect(field_error(page, "priority")).to_contain_text("changed to 3 meanwhile")
    expect(field(page, "name")).to_have_value("renamed")
    expect(field(page, "priority")).to_have_value("7")
    check_both_themes(page, "edit")
    page.get_by_role("button", name="Save", exact=True).click()
    expect(page.get_by_role("button", name="Edit")).to_be_focused()
    expect(page.get_by_role("link", name="team=<b>nlp</b>")).to_be_visible()
    job = rig.job(job_id)
    assert (job["name"], job["labels"]) == ("renamed", {"team": "<b>nlp</b>"})
    assert job["spec"]["resources"]["priority"] == 7
    page.get_by_role("link", name="team=<b>nlp</b>").click()
    expect(page.get_by_role("region", name="Jobs").get_by_role("link", name="renamed")).to_be_visible()
    expect(page.locator(".jobs tr")).to_have_count(1)


def test_resume_dialog_with_more_steps_and_an_older_checkpoint(service: str, rig: ServiceHarness, page: Page) -> None:
    job_id = job_named(rig, "fast")["id"]
    one_epoch_of(rig, job_id, steps=60)
    page.goto(f"{service}/jobs/{job_id}")
    choose(page, "resume with…")
    dialog = page.get_by_role("dialog", name="Resume fast")
    expect(field(page, "max_steps")).to_be_focused()
    field(page, "max_steps").fill("2")
    dialog.get_by_role("button", name="Resume").click()
    expect(field_error(page, "max_steps")).to_have_text("may only be raised: it is 60")
    check_both_themes(page, "resume")
    page.keyboard.press("Escape")
    expect(dialog).to_have_count(0)
    expect(page.get_by_role("button", name="More actions")).to_be_focused()
    choose(page, "resume with…")
    field(page, "max_steps").fill("100")
    field(page, "step").select_option("20")
    dialog.get_by_role("button", name="Resume").click()
    expect(page.locator(".job-title .status")).to_contain_text("queued")
    assert rig.job(job_id)["spec"]["training"]["max_steps"] == 100
    messages = [event["message"] for event in rig.data(job_id, "events") if event["data"].get("changes")]
    said = "asked to resume; goes back to step 20; newer checkpoints are set aside"
    assert messages == [f"{said}; the learning rate is 0.000775 before and 0.000906 after"]


@pytest.mark.soak
def test_kill_asks_for_confirmation_and_save_does_not(service: str, rig: ServiceHarness, page: Page) -> None:
    job_id = job_named(rig, "holds-the-slots")["id"]
    page.goto(f"{service}/jobs/{job_id}")
    choose(page, "save now")
    expect(page.get_by_text("save requested")).to_be_visible()
    choose(page, "kill")
    expect(page.get_by_role("button", name="Back")).to_be_focused()
    page.get_by_role("button", name="Back").press("Enter")
    assert rig.job(job_id)["desired"] == "run"
    choose(page, "kill")
    page.get_by_role("dialog").get_by_role("button", name="kill").click()
    expect(page.locator(".job-title .status")).to_contain_text("cancelling")
    assert rig.job(job_id)["desired"] == "kill"
    assert [event["kind"] for event in rig.data(job_id, "events")].count("save") == 1


def test_checkpoints_tab_downloads_exports_and_forks(service: str, rig: ServiceHarness, page: Page) -> None:
    assert export_process.WORKER_EXPORT[1] == "-S"
    job_id = job_named(rig, "fast")["id"]
    page.goto(f"{service}/jobs/{job_id}?tab=checkpoints")
    row = page.get_by_role("row", name=re.compile("^40 "))
    with page.expect_download() as found:
        choose_of_row(row, 40, "Download")
    assert (found.value.suggested_filename, Path(found.value.path()).read_bytes()) == ("model.safetensors", MODEL)
    for form, words in (("hf", "Hugging Face"), ("minimind", "MiniMind")):
        choose_of_row(row, 40, f"Export {words}")
        path = rig.home / "runs" / job_id / "exports" / f"step-00000040-{form}"
        expect(page.get_by_role("region", name="Exports")).to_contain_text(str(path))
        assert (path / "config.json").exists()
    with page.expect_download() as found:
        page.get_by_role("button", name="config.json").first.click()
    assert found.value.suggested_filename == "config.json"
    check_both_themes(page, "checkpoints")
    row.get_by_role("button", name="Fork from here").click()
    expect(page.get_by_label("From the checkpoint at step")).to_have_value("40")


@pytest.mark.soak
def test_lineage_links_parent_and_forks(service: str, rig: ServiceHarness, page: Page) -> None:
    parent = job_named(rig, "fast")["id"]
    overrides = {"name": "<i>child</i>", "training": {"max_steps": 500}}
    made = rig.client.post(f"/jobs/{parent}/fork", json={"step": 20, "overrides": overrides}).json()["id"]
    page.goto(f"{service}/jobs/{made}")
    lineage = page.locator(".lineage")
    expect(lineage).to_contain_text("Forked from fast at step 20")
    lineage.get_by_role("link", name="fast").click()
    expect(lineage).to_contain_text("1 fork: <i>child</i> at 20, queued")
    check_both_themes(page, "lineage")
    lineage.get_by_role("link", name="Compare").click()
    assert page.url.partition("jobs=")[2].replace("%2C", ",") == f"{parent},{made}"


def test_config_tab_compares_with_defaults_and_another_job(service: str, rig: ServiceHarness, page: Page) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    job_id, other = job_named(rig, "fast")["id"], job_named(rig, "slow")["id"]
    page.goto(f"{service}/jobs/{job_id}?tab=config")
    differs = page.get_by_role("region", name="Settings that differ")
    rig.client.patch(f"/jobs/{job_id}", json={"labels": {"true": 'null "quoted" \\ é'}})
    expect(differs.get_by_role("row", name="labels.true")).to_contain_text('null "quoted"')
    expect(differs.get_by_role("row", name="training.learning_rate")).to_contain_text("1e-3")
    expect(differs.get_by_role("row", name="training.learning_rate")).to_contain_text("5e-4")
    expect(differs).not_to_contain_text("batch_size")
    page.get_by_label("Compare with").fill(f"slow ({other})")
    expect(differs.get_by_role("row")).to_have_count(4)
    expect(differs.get_by_role("row", name="training.learning_rate")).to_contain_text("1e-4")
    check_both_themes(page, "config")
    page.reload()
    expect(differs.get_by_role("row", name="training.learning_rate")).to_contain_text("1e-4")
    copied = {}
    for form in ("JSON", "curl", "command", "Python"):
        page.get_by_role("button", name=form, exact=True).click()
        expect(page.get_by_text(f"{form} copied")).to_be_visible()
        copied[form] = page.evaluate("navigator.clipboard.readText()")
    assert json.loads(copied["JSON"]) == rig.job(job_id)["spec"]
    short = json.loads(copied["command"].partition("\n")[2].rpartition("\n")[0])
    assert rig.client.post("/jobs", json=short).json()["spec"] == rig.job(job_id)["spec"]
    assert short["training"] == {"learning_rate": 1e-3}
    assert copied["curl"].splitlines()[1:] == copied["command"].splitlines()[1:]
    literal = copied["Python"].partition("spec = ")[2].partition("\n\nwith")[0]
    assert ast.literal_eval(literal) == short
    compile(copied["Python"], "copied", "exec")


def test_a_decay_branch_is_one_button_and_the_plan_draws_its_rate(
    service: str, rig: ServiceHarness, page: Page
) -> None:
    [parent] = rig.get("/jobs", name="fast")["data"]
    page.goto(f"{service}/jobs/{parent['id']}")
    page.get_by_role("tab", name="Checkpoints").click()
    row = page.get_by_role("tabpanel").get_by_role("row").filter(has_text="Fork from here").last
    row.get_by_role("button", name="Decay from here").click()
    dialog = page.get_by_role("dialog", name="Decay from step 20")
    expect(dialog.get_by_label("Steps of the decay")).to_have_value("2")
    dialog.get_by_label("Steps of the decay").fill("0")
    dialog.get_by_role("button", name="Start the decay").click()
    expect(dialog.get_by_text("Type a whole number of steps")).to_be_visible()
    dialog.get_by_label("Steps of the decay").fill("8")
    expect(dialog.locator(".rates")).to_contain_text("at step 28")
    check_both_themes(page, "decay")
    dialog.get_by_role("button", name="Start the decay").click()
    expect(page.get_by_role("heading", name="fast-fork-20")).to_be_visible()
    [made] = rig.get("/jobs", parent=parent["id"])["data"]
    training = made["spec"]["training"]
    assert (training["lr_scheduler"], training["decay_steps"], training["max_steps"]) == ("wsd", 8, 28)
    assert made["parent"] == {"job_id": parent["id"], "step": 20, "data": "keep"}

    page.goto(f"{service}/submit?like={made['id']}")
    page.get_by_role("button", name="Plan").click()
    figure = page.locator(".rates")
    expect(figure).to_contain_text("at most 0.001, 1.00e-4 at step 28")
    points = (figure.locator("polyline").get_attribute("points") or "").split()
    assert len(points) == 28
    check_both_themes(page, "plan-rates")
