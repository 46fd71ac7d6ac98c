"""The submit page: the form from the spec's schema, the JSON, drafts, and forks."""

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright", reason="playwright is not installed")

from playwright.sync_api import Error, Locator, Page, Route, expect

from tests.browser.page_checks import check_both_themes
from tests.service.harness import ServiceHarness
from tests.service.live_server import served
from trainyard.service.devices.inventory import Device

pytestmark = pytest.mark.long


def field(page: Page, name: str) -> Locator:
    return page.get_by_label(name, exact=True)


def field_error(page: Page, name: str) -> Locator:
    """Return the error shown at a setting."""
    return page.locator(".field", has=page.get_by_label(name, exact=True)).locator(".error")


def spec_json(page: Page) -> dict[str, Any]:
    """Return the JSON of the form."""
    found: dict[str, Any] = json.loads(page.locator("#spec").input_value())
    return found


def test_the_form_sends_only_changed_settings(service: str, rig: ServiceHarness, page: Page) -> None:
    page.goto(f"{service}/submit")
    expect(page.locator("form")).to_contain_text("Options for Slurm.")
    assert not re.search(r"`|\]\(", page.locator("form").inner_text()), "Markdown in the form"
    expect(field(page, "learning_rate")).to_have_value("5e-4")
    expect(page.get_by_text("micro-batches per step")).to_be_visible()
    field(page, "data_path").fill(str(rig.corpus))
    field(page, "name").fill("from-the-page")
    field(page, "learning_rate").fill("-1e-3")
    field(page, "batch_size").fill("16")
    page.get_by_label("Find a setting").fill("beam")
    expect(page.get_by_text("No setting matches")).to_be_visible()
    page.get_by_label("Find a setting").fill("save_steps")
    expect(field(page, "save_interval")).to_be_visible()
    expect(field(page, "learning_rate")).to_be_hidden()
    field(page, "save_interval").fill("7")
    page.get_by_label("Find a setting").fill("")
    page.get_by_role("button", name="Plan").click()
    expect(field_error(page, "learning_rate")).to_have_text("should be greater than 0")
    expect(field(page, "learning_rate")).to_be_focused()
    field(page, "learning_rate").fill("1e-3")
    expect(field_error(page, "learning_rate")).to_be_hidden()
    page.get_by_role("button", name="Back to 32: batch_size").click()
    expect(field(page, "batch_size")).to_have_value("32")
    page.get_by_role("button", name="Submit").click()
    warned = page.get_by_role("button", name="Submit despite")
    expect(warned).to_be_visible()
    expect(page.get_by_role("list", name="Warnings")).to_contain_text("save_interval 7 is longer than the run")
    check_both_themes(page, "submit")
    asked = []
    page.on("request", lambda request: asked.append(request.post_data_json) if request.method == "POST" else None)
    warned.click()
    expect(page.get_by_role("heading", name="from-the-page")).to_be_visible()
    assert asked == [
        {
            "name": "from-the-page",
            "data": {"data_path": str(rig.corpus)},
            "training": {"learning_rate": 1e-3},
            "checkpoint": {"save_interval": 7},
        }
    ]
    [made] = rig.get("/jobs", name="from-the-page")["data"]
    assert made["spec"]["checkpoint"]["save_interval"] == 7


def test_a_button_applies_the_settings_that_fit(tmp_path: Path, page: Page) -> None:
    gpu = Device("cuda:0", "cuda", memory_bytes=1 << 30)
    rig = ServiceHarness(tmp_path / "home", f"sqlite:///{tmp_path}/trainyard.db", devices=[gpu])
    with served(rig) as (host, port):
        page.goto(f"http://{host}:{port}/submit")
        field(page, "data_path").fill(str(rig.corpus))
        field(page, "batch_size").fill("16")
        page.get_by_role("button", name="Plan").click()
        expect(page.get_by_role("list", name="Warnings")).to_contain_text("it fits with gradient_checkpointing true")
        expect(page.get_by_role("list", name="Advice")).to_contain_text("gives a GPU 5,440 tokens at once")
        page.get_by_role("button", name="Use gradient_checkpointing true").click()
        expect(page.get_by_role("button", name="Use gradient_checkpointing true")).to_be_hidden()
        expect(page.get_by_role("list", name="Warnings")).not_to_contain_text("of memory")
        assert spec_json(page)["training"] == {"batch_size": 16, "gradient_checkpointing": True}
    rig.close()
    rig.database.close()


def test_the_plan_follows_what_is_typed(tmp_path: Path, page: Page) -> None:
    """Memory by part, the largest batch, sources and the depth dial, without a press on Plan."""
    gpu = Device("cuda:0", "cuda", memory_bytes=2 << 30)
    rig = ServiceHarness(tmp_path / "home", f"sqlite:///{tmp_path}/trainyard.db", devices=[gpu])
    with served(rig) as (host, port):
        page.goto(f"http://{host}:{port}/submit")
        plan = page.get_by_role("region", name="Plan", exact=True)
        expect(plan).to_contain_text("as you type")
        field(page, "data_path").fill(str(rig.corpus))
        bar = plan.get_by_role("img", name=re.compile("(Fits|May not fit|Does not fit): "))
        expect(bar).to_be_visible()
        expect(field(page, "data_path")).to_be_focused()
        expect(plan.locator(".memory-parts li")).to_contain_text(["weights", "gradients", "optimizer", "activations"])
        field(page, "batch_size").fill("4096")
        expect(plan.get_by_role("img", name=re.compile("Does not fit"))).to_be_visible()
        widths = bar.locator("span:not(.part-limit)").evaluate_all("parts => parts.map((part) => part.style.width)")
        assert sum(float(width.rstrip("%")) for width in widths) == pytest.approx(100)
        largest = plan.get_by_role("button", name=re.compile(r"^Use \d+$"))
        text = largest.text_content() or ""
        largest.click()
        expect(plan.get_by_role("img", name=re.compile("Does not fit"))).to_be_hidden()
        expect(field(page, "batch_size")).to_have_value(text.removeprefix("Use "))
        expect(largest).to_be_hidden()
        field(page, "learning_rate").fill("-1")
        expect(field_error(page, "learning_rate")).to_have_text("should be greater than 0")
        expect(plan).to_contain_text("Not planned: learning_rate should be greater than 0")
        expect(field(page, "learning_rate")).to_be_focused()
        field(page, "learning_rate").fill("1e-3")
        expect(plan).not_to_contain_text("Not planned")
        page.get_by_label("Depth", exact=True).fill("3")
        proposed = page.get_by_role("region", name="Proposal")
        expect(proposed.get_by_role("row").filter(has_text="num_hidden_layers")).to_contain_text("3")
        page.get_by_label("Depth, as a dial").fill("5")
        expect(page.get_by_label("Depth", exact=True)).to_have_value("5")
        expect(proposed.get_by_role("row").filter(has_text="num_hidden_layers")).to_contain_text("5")
        check_both_themes(page, "depth-dial")
        page.get_by_role("button", name="Use these values").click()
        assert spec_json(page)["model"]["num_hidden_layers"] == 5
    rig.close()
    rig.database.close()


def test_the_plan_lists_what_the_run_reads_of_each_source(service: str, rig: ServiceHarness, page: Page) -> None:
    other = rig.corpus.with_name("other.jsonl")
    other.write_text('{"text": "two words and more"}\n' * 9)
    sources = [{"name": name, "path": str(path)} for name, path in (("one", rig.corpus), ("two", other))]
    page.goto(f"{service}/submit?view=json")
    page.get_by_label("Job spec").fill(json.dumps({"data": {"sources": sources}}))
    rows = page.get_by_role("table", name="Sources of the corpus").locator("tbody tr")
    expect(rows).to_have_count(2)
    expect(rows.nth(1)).to_contain_text("two")
    expect(rows.nth(1)).to_contain_text("%")
    check_both_themes(page, "plan-sources")


def test_form_and_json_stay_in_sync(service: str, page: Page) -> None:
    page.goto(f"{service}/submit")
    page.get_by_role("tab", name="Form").press("ArrowRight")
    expect(page.get_by_role("tab", name="JSON")).to_be_focused()
    spec = {
        "labels": {"team": "base"},
        "training": {"num_train_epochs": 3, "betas": [0.9, 0.95], "on_nonfinite": "skip", "use_compile": True},
        "reporting": {"sample_prompts": ["Once\nupon", "a time"]},
        "resources": {"timeouts": {"stop": 5}},
        "checkpoint": {"save_minutes": "often"},
        "unheard": {"of": 1},
    }
    page.get_by_label("Job spec").fill(json.dumps(spec))
    page.get_by_role("tab", name="Form").click()
    expect(field(page, "epochs")).to_have_value("3")
    expect(field(page, "betas, 2 of 2")).to_have_value("0.95")
    expect(field(page, "use_compile")).to_be_checked()
    expect(field(page, "on_nonfinite")).to_have_value("1")
    expect(field(page, "labels: value")).to_have_value("base")
    for group in ("checkpoint", "reporting", "timeouts"):
        page.locator("summary", has_text=group).last.click()
    expect(field(page, "sample_prompts")).to_have_count(2)
    expect(field(page, "stop")).to_have_value("5")
    expect(field_error(page, "save_minutes")).to_contain_text("of another type")
    field(page, "epochs").fill("4")
    found = spec_json(page)
    assert found["training"] == {"epochs": 4, "betas": [0.9, 0.95], "on_nonfinite": "skip", "use_compile": True}
    assert {name: found[name] for name in spec if name != "training"} == {
        name: value for name, value in spec.items() if name != "training"
    }
    field(page, "save_minutes").fill("2.5")
    page.get_by_role("button", name="Remove this text").first.click()
    assert spec_json(page)["checkpoint"] == {"save_minutes": 2.5}
    assert spec_json(page)["reporting"] == {"sample_prompts": ["a time"]}
    page.get_by_role("button", name="Plan").click()
    expect(field_error(page, "data_path")).to_contain_text("is required")
    page.get_by_role("button", name="/unheard").click()
    assert page.evaluate("getSelection().toString()") == '"unheard"'
    page.get_by_label("Job spec").fill("{")
    page.get_by_role("button", name="Plan").click()
    expect(page.get_by_text("This is not JSON")).to_be_visible()


def test_several_paths_are_one_a_line_and_sources_are_kept(service: str, page: Page) -> None:
    page.goto(f"{service}/submit")
    field(page, "data_path").fill("/data/a.jsonl\n/data/b\n")
    assert spec_json(page)["data"] == {"data_path": ["/data/a.jsonl", "/data/b"]}
    sources = [{"name": "web", "path": ["/data/web"], "weight": 0.5}]
    page.get_by_role("tab", name="JSON").click()
    page.get_by_label("Job spec").fill(json.dumps({"data": {"data_path": ["/x", "/y"], "sources": sources}}))
    page.get_by_role("tab", name="Form").click()
    expect(field(page, "data_path")).to_have_value("/x\n/y")
    field(page, "data_path").fill("")
    field(page, "name").fill("mixed")
    assert spec_json(page)["data"]["sources"] == sources
    assert spec_json(page)["data"].get("data_path") is None


@pytest.mark.soak
def test_a_draft_survives_a_reload_and_can_be_discarded(service: str, page: Page) -> None:
    page.goto(f"{service}/submit")
    field(page, "name").fill("half-typed")
    page.reload()
    expect(field(page, "name")).to_have_value("half-typed")
    page.get_by_role("button", name="Start over").click()
    expect(field(page, "name")).to_have_value("pretrain")


def test_the_fork_form_starts_with_the_parents_values(service: str, rig: ServiceHarness, page: Page) -> None:
    [parent] = rig.get("/jobs", name="fast")["data"]
    parent_id = parent["id"]
    page.goto(f"{service}/submit?fork={parent_id}&step=20")
    expect(page.get_by_role("heading", name="Fork fast")).to_be_visible()
    expect(page.get_by_label("From the checkpoint at step")).to_have_value("20")
    expect(field(page, "name")).to_have_value("fast-fork-20")
    page.locator("summary", has_text=re.compile("^model")).click()
    field(page, "hidden_size").fill("768")
    field(page, "learning_rate").fill("1e-4")
    fork = page.get_by_role("button", name=re.compile("^Fork"))
    fork.click()
    expect(field_error(page, "hidden_size")).to_contain_text("the parent's weights were trained with it")
    expect(field(page, "hidden_size")).to_be_focused()
    page.get_by_role("button", name="Back to 512: hidden_size").click()
    expect(field_error(page, "epochs")).to_contain_text("10 steps are all done")
    field(page, "max_steps").fill("500")
    fork.click()
    expect(page.get_by_role("region", name="Plan")).to_contain_text("480, 21 to 500")
    check_both_themes(page, "fork")
    fork.click()
    expect(page.get_by_role("heading", name="fast-fork-20")).to_be_visible()
    [made] = rig.get("/jobs", parent=parent_id)["data"]
    assert made["parent"] == {"job_id": parent_id, "step": 20, "data": "keep"}
    assert made["spec"]["training"]["learning_rate"] == 1e-4


def test_the_form_works_over_plain_http(service: str, rig: ServiceHarness, page: Page) -> None:
    """Without TLS, a browser offers fewer functions to a page of another host, as with ``--host 0.0.0.0``."""
    address = "http://trainer.example:8000"

    def forward(route: Route) -> None:
        # Without these headers: they name the address that the page has in this test.
        kept = {name: value for name, value in route.request.headers.items() if not name.startswith(("origin", "sec-"))}
        with suppress(Error):  # a request that the page has abandoned
            route.fulfill(response=route.fetch(url=route.request.url.replace(address, service), headers=kept))

    page.route(f"{address}/**", forward)
    page.route("**/metrics/stream**", lambda route: route.abort())
    for name in ("first-over-http", "second-over-http"):
        page.goto(f"{address}/submit")
        assert page.evaluate("isSecureContext") is False
        field(page, "data_path").fill(str(rig.corpus))
        field(page, "name").fill(name)
        expect(page.locator(".plan .facts")).to_contain_text("Parameters")
        page.get_by_role("button", name="Submit", exact=True).click()
        page.get_by_role("button", name="Submit despite").click()
        expect(page.get_by_role("heading", name=name)).to_be_visible()
    page.unroute_all(behavior="ignoreErrors")
    assert len({job["id"] for job in rig.get("/jobs", search="over-http")["data"]}) == 2
