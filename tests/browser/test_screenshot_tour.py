"""Screenshots for the guide: the pages of a service with real runs.

Taken by `TRAINYARD_SCREENSHOTS=docs/screenshots make soak PYTEST_ARGS=tests/browser/test_screenshot_tour.py`.
"""

import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright", reason="playwright is not installed")

from playwright.sync_api import Page, expect

from benchmarks.corpus import write_docstrings
from tests.browser.page_checks import check_both_themes
from tests.browser.test_charts import figure
from tests.story.service_process import Served, until

pytestmark = [pytest.mark.soak, pytest.mark.slow, pytest.mark.timeout(0)]

STEPS = 300
FORK_AT = 150
RUN_TIMEOUT_SECONDS = 900.0
"""Seconds for one run, on a busy machine."""


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    # Not pytest's temporary folder: the path is visible in the screenshots.
    folder = Path(tempfile.mkdtemp(prefix="trainyard-"))
    write_docstrings(folder / "docstrings.jsonl", 7000)
    service = Served(folder / "home", [folder])
    service.start()
    yield service
    # Runs outlive their service.
    going = [job["id"] for job in service.get("/jobs?status=running").json()["data"]]
    for job_id in going:
        service.post(f"/jobs/{job_id}/kill")
        service.wait(job_id, "cancelled", seconds=RUN_TIMEOUT_SECONDS)
    service.stop()
    shutil.rmtree(folder)


# Small, so that the four runs take about a minute of two cores and not six.
def spec(served: Served, name: str, labels: dict[str, str], **training: Any) -> dict[str, Any]:
    return {
        "name": name,
        "labels": labels,
        "model": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
        "data": {"data_path": str(served.home.parent / "docstrings.jsonl"), "max_seq_len": 128, "eval_fraction": 0.01},
        "training": {"max_steps": STEPS, "batch_size": 8, "accumulation_steps": 1, "warmup_steps": 20, **training},
        "checkpoint": {"save_interval": 50, "keep_last": 8},
        "reporting": {"log_interval": 1, "eval_interval": 50, "sample_prompts": ["Return the", "A list of"]},
        "resources": {"device": "cpu"},
    }


@pytest.fixture(scope="module")
def jobs(served: Served) -> dict[str, str]:
    """Two optimizers, a fork with a higher learning rate, a paused and resumed job, a running one and a queued one."""
    team = {"team": "docs"}
    first = served.submit(spec(served, "docstrings-adamw", team, learning_rate=2e-3))
    served.wait(first, "succeeded", seconds=RUN_TIMEOUT_SECONDS)
    muon = served.submit(spec(served, "docstrings-muon", team, learning_rate=5e-3, optimizer="muon"))
    until(lambda: served.step(muon) >= FORK_AT, RUN_TIMEOUT_SECONDS)
    served.post(f"/jobs/{muon}/pause")
    served.wait(muon, "paused", seconds=RUN_TIMEOUT_SECONDS)
    served.post(f"/jobs/{muon}/resume")
    served.wait(muon, "succeeded", seconds=RUN_TIMEOUT_SECONDS)
    asked = {"step": FORK_AT, "overrides": {"name": "docstrings-adamw-hot", "training": {"learning_rate": 4e-3}}}
    fork = str(served.post(f"/jobs/{first}/fork", asked).json()["id"])
    served.wait(fork, "succeeded", seconds=RUN_TIMEOUT_SECONDS)
    wide = spec(served, "docstrings-two-ranks", {**team, "size": "wide"}, learning_rate=1e-3, max_steps=20_000)
    running = served.submit({**wide, "resources": {"device": "cpu", "nproc_per_node": 2}})
    waiting = served.submit(spec(served, "docstrings-next", team, dtype="float32"))
    until(lambda: served.step(running) >= 20, RUN_TIMEOUT_SECONDS)
    return {"adamw": first, "muon": muon, "fork": fork, "running": running, "waiting": waiting}


def drawn(page: Page, name: str = "Train loss") -> None:
    expect(figure(page, name).locator(".scatterlayer .trace").first).to_be_visible()


def test_jobs_and_system(served: Served, jobs: dict[str, str], page: Page) -> None:
    page.goto(served.url)
    expect(page.get_by_role("row")).to_have_count(len(jobs) + 1)
    check_both_themes(page, "tour-jobs")
    page.goto(f"{served.url}/system")
    expect(page.get_by_role("heading", name="Devices")).to_be_visible()
    check_both_themes(page, "tour-system")


def test_a_running_and_a_paused_job(served: Served, jobs: dict[str, str], page: Page) -> None:
    page.goto(f"{served.url}/jobs/{jobs['muon']}")
    drawn(page)
    expect(page.get_by_role("region", name="Attempts").get_by_role("row")).to_have_count(3)
    check_both_themes(page, "tour-job")
    page.get_by_role("tab", name="samples").click()
    expect(page.locator("main")).to_contain_text("Return the")
    check_both_themes(page, "tour-samples")
    page.get_by_role("tab", name="checkpoints").click()
    expect(page.get_by_role("row", name=re.compile(f"^{STEPS} "))).to_be_visible()
    check_both_themes(page, "tour-checkpoints")


def test_compare(served: Served, jobs: dict[str, str], page: Page) -> None:
    chosen = ",".join(jobs[name] for name in ("adamw", "muon", "fork"))
    page.goto(f"{served.url}/compare?jobs={chosen}")
    drawn(page)
    expect(page.get_by_role("region", name="Differing settings")).to_contain_text("training.optimizer")
    check_both_themes(page, "tour-compare")
