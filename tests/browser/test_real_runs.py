"""A real service with real ranks, used only through the pages: submit, watch, pause, restart the server, compare."""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright", reason="playwright is not installed")

from playwright.sync_api import Locator, Page, expect

from benchmarks.corpus import write_docstrings
from tests.browser.test_charts import drag, figure, zoomed
from tests.browser.test_job_actions import choose, choose_of_row
from tests.story.service_process import RANKS, Served, until

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(900)]

NAME = "<script>document.title = 'taken'</script>"
STEPS = 200_000


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "corpus.jsonl"
    assert write_docstrings(file, 200) == 200
    return file


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Iterator[Served]:
    service = Served(tmp_path_factory.mktemp("home") / "home", [corpus.parent])
    service.start()
    yield service
    service.stop()


def spec(corpus: Path) -> dict[str, Any]:
    """Many small steps, so that the run is not over before the browser has seen it."""
    return {
        "name": NAME,
        "model": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1},
        "data": {"data_path": str(corpus), "max_seq_len": 32},
        "training": {"max_steps": STEPS, "batch_size": 2, "accumulation_steps": 1, "learning_rate": 2e-3},
        "checkpoint": {"save_interval": 100},
        "reporting": {"log_interval": 5, "sample_prompts": ["Return the"]},
        "resources": {"device": "cpu", "nproc_per_node": RANKS},
    }


def submitted(page: Page, served: Served, wanted: dict[str, Any]) -> str:
    """Submit JSON on the submit page; return the id from the URL of the job page that opens."""
    page.goto(f"{served.url}/submit")
    page.get_by_role("tab", name="JSON").click()
    page.get_by_label("Job spec").fill(json.dumps(wanted))
    return launched(page, "Submit")


def launched(page: Page, verb: str) -> str:
    """Press the button, and press again if the plan has warnings; return the job's id."""
    page.get_by_role("button", name=re.compile(f"^{verb}")).click()
    left = page.get_by_role("tab", name="overview")
    warned = page.get_by_role("button", name=re.compile("despite"))
    expect(left.or_(warned)).to_be_visible()
    if warned.is_visible():
        warned.click()
    expect(left).to_be_visible()
    return page.url.rsplit("/", 1)[1].partition("?")[0]


def step_of(chart: Locator) -> int:
    """Return the last step of the curve, from the chart's label."""
    found = re.search(r" to ([\d,]+), now", chart.get_attribute("aria-label") or "")
    return int(found.group(1).replace(",", "")) if found else 0


def grown(chart: Locator, beyond: int) -> int:
    """Wait until the curve is longer than ``beyond`` steps; return its last step."""
    until(lambda: step_of(chart) > beyond)
    return step_of(chart)


def test_a_real_run_from_submit_to_cancel_in_the_browser(served: Served, corpus: Path, page: Page) -> None:
    broken: list[str] = []
    page.on("pageerror", lambda error: broken.append(str(error)))
    job_id = submitted(page, served, spec(corpus))
    expect(page.get_by_role("heading", name=NAME)).to_be_visible()
    assert "taken" not in page.title().removeprefix(NAME)
    chart, status = figure(page, "Train loss"), page.locator(".job-title .status")
    expect(status).to_contain_text("running")
    at = grown(chart, grown(chart, 0))
    expect(chart.locator(".nsewdrag").first).to_be_visible()
    drag(page, chart, 0.2, 0.6)
    page.wait_for_url(re.compile("zoom="))
    before = zoomed(page)
    expect(page.locator(".facts")).not_to_contain_text(re.compile(rf"Step ?{at:,} of"))
    page.get_by_role("button", name="pause", exact=True).click()
    expect(status).to_contain_text("paused")
    assert zoomed(page) == before
    chart.get_by_role("button", name="whole run").click()
    paused_at = served.step(job_id)
    grown(chart, at)
    page.get_by_role("button", name="resume", exact=True).click()
    expect(status).to_contain_text("running")
    served.kill()
    expect(page.locator("#offline")).to_contain_text("runs continue without it")
    kept = step_of(chart)
    assert kept > 0
    expect(status).to_contain_text("running")
    served.start()
    expect(page.locator("#offline")).to_be_hidden()
    assert grown(chart, max(kept, paused_at)) > paused_at
    choose(page, "cancel")
    page.get_by_role("dialog").get_by_role("button", name="cancel").click()
    expect(status).to_contain_text("cancelled")
    page.get_by_role("tab", name="overview").click()
    expect(page.get_by_role("region", name="Attempts").get_by_role("row")).to_have_count(3)
    page.get_by_role("tab", name="logs").click()
    expect(page.get_by_role("region", name="Log", exact=True)).to_contain_text("loss")
    path = f"/jobs/{job_id}/metrics?max_points=1000&fields=tokens,grad_norm,at"
    assert served.get(path).content == served.get(path).content
    assert broken == []


@pytest.mark.soak
def test_download_fork_and_compare_real_runs(served: Served, corpus: Path, page: Page) -> None:
    wanted = {**spec(corpus), "name": "parent", "training": {**spec(corpus)["training"], "max_steps": 200}}
    parent = served.submit(wanted)
    served.wait(parent, "succeeded")
    page.goto(f"{served.url}/jobs/{parent}?tab=checkpoints")
    row = page.get_by_role("row", name=re.compile("^100 "))
    with page.expect_download() as downloading:
        choose_of_row(row, 100, "Download")
    saved = Path(downloading.value.path()).read_bytes()
    listed = {one["step"]: one["sha256"] for one in served.get(f"/jobs/{parent}/checkpoints").json()["data"]}
    assert hashlib.sha256(saved).hexdigest() == listed[100]
    row.get_by_role("button", name="Fork from here").click()
    page.get_by_label("learning_rate", exact=True).fill("4e-3")
    child = launched(page, "Fork")
    served.wait(child, "succeeded")
    page.goto(f"{served.url}/compare?jobs={parent},{child}&x=step")
    chart = figure(page, "Train loss")
    # Two lines, and the circle where they meet.
    expect(chart.locator(".scatterlayer .trace")).to_have_count(3)
    drawn = chart.locator(".js-plotly-plot").first.evaluate("node => node.data.map(one => [one.uid, one.x, one.y])")
    curves = {uid: dict(zip(xs, ys, strict=True)) for uid, xs, ys in drawn}
    assert min(curves[child]) == 100, "a fork joins its parent at its step"
    assert curves[child][100] == curves[parent][100]
    assert curves[child][200] != curves[parent][200]
    expect(page.get_by_role("region", name="Differing settings")).to_contain_text("training.learning_rate")
