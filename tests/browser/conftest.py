"""A real browser, and a service on a real socket."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("playwright", reason="playwright is not installed")

from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.service.harness import ServiceHarness
from tests.service.live_server import served
from tests.service.test_checkpoints import write_checkpoint

CHROMIUM = shutil.which("chromium")
# For each wait: on a machine that is busy with other tests a browser is slow.
TIMEOUT_MS = 60_000
POLICY = "Content Security Policy"


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[ServiceHarness]:
    made = ServiceHarness(tmp_path / "home", f"sqlite:///{tmp_path}/trainyard.db")
    yield made
    made.close()
    made.database.close()


@pytest.fixture
def service(rig: ServiceHarness) -> Iterator[str]:
    """Two finished jobs with different learning rates and two checkpoints each, a running job and a queued one."""
    for name, rate, offset in (("slow", 1e-4, 0.5), ("fast", 1e-3, 0.0)):
        job_id, attempt = rig.running(steps=60, name=name, training={"learning_rate": rate})
        for step in range(1, 61):
            attempt.metric(step, loss=8 - step / 12 + offset, tokens=step * 2048, learning_rate=rate)
        for step in (20, 40):
            write_checkpoint(rig.checkpoint(job_id, attempt, step))
        rig.ship(attempt)
        rig.exit(attempt, "completed", step=60)
    rig.running(steps=1000, name="holds-the-slots", resources={"nproc_per_node": 2})
    rig.submit(name="waits", resources={"nproc_per_node": 2})
    with served(rig) as (host, port):
        yield f"http://{host}:{port}"


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """One browser for all tests; each page has its own context with its own cache and storage.

    It ends with this package: while it lives, an event loop runs in this thread, and tests of asyncio cannot start one.
    """
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=2 * TIMEOUT_MS)
        yield made
        made.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    made = browser.new_page()
    blocked: list[str] = []
    made.on("console", lambda message: blocked.append(message.text) if POLICY in message.text else None)
    made.set_default_timeout(TIMEOUT_MS)
    expect.set_options(timeout=TIMEOUT_MS)
    yield made
    made.close()
    assert blocked == [], "the pages and the chart library must satisfy the content security policy"
