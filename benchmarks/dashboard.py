"""Measures the dashboard in a browser: first paint, a long run, redraws, latency of updates, memory, many jobs."""

import contextlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import httpx2
from sqlalchemy import update

from benchmarks.load import curve, live
from benchmarks.load.live import Agent
from benchmarks.load.tables import Figure, machine, quantile
from benchmarks.load.wire_bytes import Wire
from benchmarks.running import Served, served, until
from trainyard.contract.status import JobStatus
from trainyard.service.db.models import JobRow
from trainyard.service.jobs import repository

CHROMIUM = shutil.which("chromium")
POINTS = 1_000_000
OPENS = 9
REDRAWS = 20
REPORTS = 10
UPDATES = 1000
POLL_MS = 2000
JOBS = 1000
CHOSEN = 10
STEPS = 2000
"""Points of each of the chosen jobs."""
TALL = {"width": 1280, "height": 2400}

MARKS = "Object.fromEntries(performance.getEntriesByType('mark').map((mark) => [mark.name, mark.startTime]))"
"""ms from the request of the page to the frame that shows its first text (`text`), and its first curve (`curve`)."""

BROWSER_START_SECONDS = 1.5
PAGE_OPEN_SECONDS = 4.0
"""Waits for the browser to start, and for the page to be complete before a debugger is attached."""

REDRAW = """async () => {
  const figures = [...document.querySelectorAll('figure')];
  const charts = figures.map((node) => node.chart).filter((chart) => chart.started).slice(0, 6);
  const moved = (trace) => ({ ...trace, x: [...trace.x], y: trace.y.map((y) => (y === null ? null : y * 1.01)) });
  for (const chart of charts) chart.show({ ...chart.content, traces: chart.content.traces.map(moved) });
  const began = performance.now();
  await Promise.all(charts.map((chart) => chart.draw()));
  return [performance.now() - began, charts.filter((chart) => chart.isVisible).length];
}"""


SCROLL = """async () => {
  const box = document.querySelector('.runs');
  const frames = [];
  box.scrollTop = 0;
  let before = await new Promise(requestAnimationFrame);
  while (box.scrollTop + box.clientHeight < box.scrollHeight) {
    box.scrollTop += 400;
    const now = await new Promise(requestAnimationFrame);
    frames.push(now - before);
    before = now;
  }
  return frames;
}"""
"""Times between frames in ms while the table is scrolled from its top to its end."""

REDRAW_VISIBLE = REDRAW.replace(".slice(0, 6)", ".filter((chart) => chart.isVisible)")


def main() -> None:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        print("skipped: playwright is not installed")
        return
    if CHROMIUM is None:
        print("skipped: chromium is not installed")
        return
    print(machine(), flush=True)
    with start_bench() as (service, small, large), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        print(f"chromium {browser.version}", flush=True)
        for figure in chain(
            measure_opening(playwright, service, small, large), measure_open_page(browser, service, small, large)
        ):
            print(figure.line(), flush=True)
        with start_workspace() as (workspace, ids):
            for figure in measure_workspace(playwright, browser, workspace, ids):
                print(figure.line(), flush=True)
        browser.close()


@contextlib.contextmanager
def start_bench() -> Iterator[tuple[Served, Agent, Agent]]:
    """Start a service without a scheduler, with a run of a few points and a run of a million points."""
    with live.home_with_jobs(2) as (home, [small, large]):
        with live.database(home) as database:
            curve.fill(database, large.job_id, POINTS)
            with database.write() as session:
                repository.lock(session, large.job_id).progress = {"step": POINTS, "steps": 2 * POINTS, "percent": 50.0}
        with served(home, home.parent, arguments=["--no-scheduler"]) as service:
            with Wire(service.url, small.token) as wire:
                for _ in range(100):
                    small.metric()
                small.upload(wire)
            yield service, small, large


@contextlib.contextmanager
def start_workspace() -> Iterator[tuple[Served, list[str]]]:
    """Start a service with a thousand jobs; yield it with the ids of ten that have curves."""
    with live.home_with_jobs(JOBS) as (home, agents):
        chosen = [agent.job_id for agent in agents[-CHOSEN:]]
        with live.database(home) as database:
            for job_id in chosen:
                curve.fill(database, job_id, STEPS)
            with database.write() as session:
                ended = {"status": JobStatus.SUCCEEDED, "progress": {"step": STEPS, "steps": STEPS, "percent": 100.0}}
                session.execute(update(JobRow).values(**ended))
        with served(home, home.parent, arguments=["--no-scheduler"]) as service:
            yield service, chosen


def measure_workspace(playwright: Any, browser: Any, service: Served, ids: list[str]) -> Iterator[Figure]:
    at = [open_page(playwright, f"{service.url}/", "text") for _ in range(OPENS)][1:]
    yield Figure(f"{JOBS:,} jobs listed: first rows painted", _median(at, "text"), "ms", 1000)
    page = browser.new_page(viewport=TALL)
    page.set_default_timeout(120_000)
    page.goto(f"{service.url}/?jobs={','.join(ids)}")
    page.wait_for_function("() => document.querySelectorAll('figure .js-line').length >= 40")
    page.wait_for_function("() => document.querySelector('.runs table').ariaRowCount >= 1001")
    frames = page.evaluate(SCROLL)
    yield Figure(f"{JOBS:,} jobs scrolled through: longest of {len(frames)} frames", max(frames), "ms", 50)
    took = [page.evaluate(REDRAW_VISIBLE) for _ in range(REDRAWS)]
    shown = f"{CHOSEN} chosen jobs redrawn in {took[0][1]} charts, median of {REDRAWS}"
    yield Figure(shown, quantile([ms for ms, _ in took[2:]], 0.5), "ms", 150)
    page.close()


def measure_opening(playwright: Any, service: Served, small: Agent, large: Agent) -> Iterator[Figure]:
    at = [open_page(playwright, f"{service.url}/jobs/{small.job_id}") for _ in range(OPENS)][1:]
    yield Figure(f"text painted, nothing in the cache, median of {OPENS - 1}", _median(at, "text"), "ms", 300)
    at = [open_page(playwright, f"{service.url}/jobs/{large.job_id}") for _ in range(OPENS)][1:]
    yield Figure(f"a run of {POINTS:,} points: text", _median(at, "text"), "ms", 300)
    yield Figure(f"a run of {POINTS:,} points: curve drawn", _median(at, "curve"), "ms", 1000)


def measure_open_page(browser: Any, service: Served, small: Agent, large: Agent) -> Iterator[Figure]:
    yield measure_redraw(browser, f"{service.url}/jobs/{large.job_id}?tab=metrics")
    with Wire(service.url, small.token) as wire:
        yield measure_latency(browser, service, small, wire)
        yield from measure_growth(browser, service, small, wire)


def _median(at: list[dict[str, float]], name: str) -> float:
    return quantile([one[name] for one in at], 0.5)


def open_page(playwright: Any, url: str, last: str = "curve") -> dict[str, float]:
    """Open a page in a browser with an empty cache and return its performance marks. ``last``: the mark to wait for.

    No debugger is attached while the page opens: with one the browser compiles the chart library a second time, to
    know the lines of exceptions that the library catches.
    """
    with new_browser() as address:
        time.sleep(BROWSER_START_SECONDS)
        assert httpx2.put(f"{address}/json/new?{url}").status_code == 200
        time.sleep(PAGE_OPEN_SECONDS)
        browser = playwright.chromium.connect_over_cdp(address)
        [page] = [page for context in browser.contexts for page in context.pages if page.url == url]
        page.wait_for_function("name => performance.getEntriesByName(name).length > 0", arg=last)
        found: dict[str, float] = page.evaluate(MARKS)
        browser.close()
    return found


@contextlib.contextmanager
def new_browser() -> Iterator[str]:
    """Start a browser with a new profile; yield the URL of its debugging port."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        port_file = Path(profile) / "DevToolsActivePort"
        options = ["--headless=new", "--no-sandbox", "--remote-debugging-port=0", f"--user-data-dir={profile}"]
        process = subprocess.Popen(
            [str(CHROMIUM), *options, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            port = until(lambda: port_file.exists() and port_file.read_text().split())[0]
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(30)


def measure_redraw(browser: Any, url: str) -> Figure:
    """Redraw six charts of a thousand points with new values each time."""
    page = browser.new_page(viewport=TALL)
    page.goto(url)
    page.wait_for_function("() => document.querySelectorAll('figure .js-line').length >= 6")
    took = []
    for _ in range(REDRAWS):
        ms, seen = page.evaluate(REDRAW)
        assert seen == 6, seen
        took.append(ms)
    page.close()
    return Figure(f"six charts of a thousand points redrawn, median of {REDRAWS}", quantile(took[2:], 0.5), "ms", 120)


def measure_latency(browser: Any, service: Served, agent: Agent, wire: Wire) -> Figure:
    """Measure the time from a worker's report to the page's text; the worst of several."""
    page = browser.new_page()
    page.goto(f"{service.url}/jobs/{agent.job_id}")
    page.wait_for_selector("figure .js-line", state="attached")
    took = []
    for _ in range(REPORTS):
        began = time.perf_counter()
        step = report(agent, wire)
        page.wait_for_function(
            "step => document.querySelector('.facts dd').textContent.startsWith(step)", arg=str(step)
        )
        took.append(time.perf_counter() - began)
    page.close()
    return Figure(f"a worker's report shown, worst of {REPORTS}", max(took), "s", 2)


def report(agent: Agent, wire: Wire) -> int:
    """Report one more point; return its step."""
    agent.metric()
    agent.upload(wire)
    return len(agent.outbox)


def measure_growth(browser: Any, service: Served, agent: Agent, wire: Wire) -> Iterator[Figure]:
    """Measure the growth of a tab over many drawn updates, with the page's clock fast-forwarded."""
    page = browser.new_page()
    page.clock.install()
    page.goto(f"{service.url}/jobs/{agent.job_id}")
    devtools = page.context.new_cdp_session(page)
    devtools.send("Performance.enable")
    drawn = "step => document.querySelector('figure')?.getAttribute('aria-label').includes(`to ${step}, now`) ?? false"
    before: dict[str, float] = {}
    for number in range(UPDATES + 50):
        if number == 50:
            before = tab_metrics(devtools)
        step = f"{report(agent, wire):,}"
        page.clock.run_for(POLL_MS)
        while not page.evaluate(drawn, step):
            page.clock.run_for(POLL_MS / 4)
    after = tab_metrics(devtools)
    page.close()
    growth = (after["JSHeapUsedSize"] - before["JSHeapUsedSize"]) / 1e6
    yield Figure(f"a tab open over {UPDATES:,} updates grows by", growth, "MB", 50)
    yield Figure(f"elements it has more after {UPDATES:,} updates", after["Nodes"] - before["Nodes"], "")


def tab_metrics(devtools: Any) -> dict[str, float]:
    """Return the tab's metrics after a garbage collection."""
    devtools.send("HeapProfiler.collectGarbage")
    return {one["name"]: one["value"] for one in devtools.send("Performance.getMetrics")["metrics"]}
