"""What the dashboard costs who looks at it, in a browser of its own: paint, a long run, redraws, freshness, memory."""

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

from benchmarks.load import curve, live
from benchmarks.load.figures import Figure, machine, quantile
from benchmarks.load.live import Agent
from benchmarks.load.wire import Wire
from benchmarks.running import Served, served, until
from service.jobs import store

CHROMIUM = shutil.which("chromium")
POINTS = 1_000_000
OPENED = 9
REDRAWN = 20
HEARD = 10
UPDATES = 1000
BEAT_MS = 2000
TALL = {"width": 1280, "height": 2400}

MARKS = "Object.fromEntries(performance.getEntriesByType('mark').map((mark) => [mark.name, mark.startTime]))"
"""ms from the request for the page to the frame that shows its first words (`text`), and its first curve."""

SETTLES = 1.5
OPENS = 4.0
"""Seconds for the browser to come up, and for the page to be done before a debugger looks at it."""

REDRAW = """async () => {
  const charts = [...document.querySelectorAll('figure')].slice(0, 6).map((node) => node.chart);
  const moved = (trace) => ({ ...trace, x: [...trace.x], y: trace.y.map((y) => (y === null ? null : y * 1.01)) });
  for (const chart of charts) chart.show({ ...chart.content, traces: chart.content.traces.map(moved) });
  const began = performance.now();
  await Promise.all(charts.map((chart) => chart.draw()));
  return [performance.now() - began, charts.filter((chart) => chart.isSeen).length];
}"""


def main() -> None:
    """Print each figure beside its goal."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        print("skipped: playwright is not installed")
        return
    if CHROMIUM is None:
        print("skipped: there is no chromium")
        return
    print(machine(), flush=True)
    with bench() as (service, small, large), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        print(f"chromium {browser.version}", flush=True)
        for figure in chain(opening(playwright, service, small, large), figures(browser, service, small, large)):
            print(figure.line(), flush=True)
        browser.close()


@contextlib.contextmanager
def bench() -> Iterator[tuple[Served, Agent, Agent]]:
    """A service with a run of a few points and one of a million; nobody schedules."""
    with tempfile.TemporaryDirectory() as folder:
        home, corpus = Path(folder) / "home", Path(folder) / "corpus.jsonl"
        corpus.write_text('{"text": "one"}\n')
        with live.database(home) as made:
            small, large = live.running(made, corpus, 2)
            curve.fill(made, large.job_id, POINTS)
            with made.write() as session:
                store.lock(session, large.job_id).progress = {"step": POINTS, "steps": 2 * POINTS, "percent": 50.0}
        with served(home, Path(folder), arguments=["--no-scheduler"]) as service:
            with Wire(service.url, small.token) as wire:
                for _ in range(100):
                    small.metric()
                small.ship(wire)
            yield service, small, large


def opening(playwright: Any, service: Served, small: Agent, large: Agent) -> Iterator[Figure]:
    """How soon a page is there."""
    at = [opened(playwright, f"{service.url}/jobs/{small.job_id}") for _ in range(OPENED)][1:]
    yield Figure(f"text painted, nothing in the cache, median of {OPENED - 1}", _median(at, "text"), "ms", 300)
    at = [opened(playwright, f"{service.url}/jobs/{large.job_id}") for _ in range(OPENED)][1:]
    yield Figure(f"a run of {POINTS:,} points: text", _median(at, "text"), "ms", 300)
    yield Figure(f"a run of {POINTS:,} points: curve drawn", _median(at, "curve"), "ms", 1000)


def figures(browser: Any, service: Served, small: Agent, large: Agent) -> Iterator[Figure]:
    """What is known while it stands open."""
    yield redrawn(browser, f"{service.url}/jobs/{large.job_id}?tab=metrics")
    with Wire(service.url, small.token) as wire:
        yield heard(browser, service, small, wire)
        yield from grown(browser, service, small, wire)


def _median(at: list[dict[str, float]], name: str) -> float:
    return quantile([one[name] for one in at], 0.5)


def opened(playwright: Any, url: str) -> dict[str, float]:
    """The page's own marks, in a browser that has seen nothing of it.

    Nobody watches while it opens: with a debugger attached the browser compiles the chart library once more, to know
    the lines of exceptions that the library catches itself.
    """
    with unwatched() as address:
        time.sleep(SETTLES)
        assert httpx2.put(f"{address}/json/new?{url}").status_code == 200
        time.sleep(OPENS)
        browser = playwright.chromium.connect_over_cdp(address)
        [page] = [page for context in browser.contexts for page in context.pages if page.url == url]
        page.wait_for_function("performance.getEntriesByName('curve').length > 0")
        found: dict[str, float] = page.evaluate(MARKS)
        browser.close()
    return found


@contextlib.contextmanager
def unwatched() -> Iterator[str]:
    """A browser with a profile of its own, and where it takes orders."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        orders = Path(profile) / "DevToolsActivePort"
        options = ["--headless=new", "--no-sandbox", "--remote-debugging-port=0", f"--user-data-dir={profile}"]
        process = subprocess.Popen(
            [str(CHROMIUM), *options, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            port = until(lambda: orders.exists() and orders.read_text().split())[0]
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(30)


def redrawn(browser: Any, url: str) -> Figure:
    """Six charts of a thousand points, with other values each time."""
    page = browser.new_page(viewport=TALL)
    page.goto(url)
    page.wait_for_function("() => document.querySelectorAll('figure .js-line').length > 12")
    took = []
    for _ in range(REDRAWN):
        ms, seen = page.evaluate(REDRAW)
        assert seen == 6, seen
        took.append(ms)
    page.close()
    return Figure(f"six charts of a thousand points redrawn, median of {REDRAWN}", quantile(took[2:], 0.5), "ms", 120)


def heard(browser: Any, service: Served, agent: Agent, wire: Wire) -> Figure:
    """From the worker's report to the page's text, the worst of several."""
    page = browser.new_page()
    page.goto(f"{service.url}/jobs/{agent.job_id}")
    page.wait_for_selector("figure .js-line", state="attached")
    took = []
    for _ in range(HEARD):
        began = time.perf_counter()
        step = report(agent, wire)
        page.wait_for_function(
            "step => document.querySelector('.facts dd').textContent.startsWith(step)", arg=str(step)
        )
        took.append(time.perf_counter() - began)
    page.close()
    return Figure(f"a worker's report shown, worst of {HEARD}", max(took), "s", 2)


def report(agent: Agent, wire: Wire) -> int:
    """One more point; the step it is of."""
    agent.metric()
    agent.ship(wire)
    return len(agent.outbox)


def grown(browser: Any, service: Served, agent: Agent, wire: Wire) -> Iterator[Figure]:
    """What a tab holds on to over many updates, each of them drawn; the page's clock goes as fast as it can."""
    page = browser.new_page()
    page.clock.install()
    page.goto(f"{service.url}/jobs/{agent.job_id}")
    devtools = page.context.new_cdp_session(page)
    devtools.send("Performance.enable")
    drawn = "step => document.querySelector('figure').getAttribute('aria-label').includes(`to ${step}, now`)"
    before: dict[str, float] = {}
    for number in range(UPDATES + 50):
        if number == 50:
            before = held(devtools)
        step = f"{report(agent, wire):,}"
        page.clock.run_for(BEAT_MS)
        while not page.evaluate(drawn, step):
            page.clock.run_for(BEAT_MS / 4)
    after = held(devtools)
    page.close()
    growth = (after["JSHeapUsedSize"] - before["JSHeapUsedSize"]) / 1e6
    yield Figure(f"a tab open over {UPDATES:,} updates grows by", growth, "MB", 50)
    yield Figure(f"elements it has more after {UPDATES:,} updates", after["Nodes"] - before["Nodes"], "")


def held(devtools: Any) -> dict[str, float]:
    """What the tab needs, once what it does not need is gone."""
    devtools.send("HeapProfiler.collectGarbage")
    return {one["name"]: one["value"] for one in devtools.send("Performance.getMetrics")["metrics"]}
