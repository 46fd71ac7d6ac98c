"""What the dashboard costs who looks at it, in a browser of its own: paint, a long run, redraws, freshness, memory."""

import contextlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.load import curve, live
from benchmarks.load.figures import Figure, machine, quantile
from benchmarks.load.live import Agent
from benchmarks.load.wire import Wire
from benchmarks.running import Served, served
from service.jobs import store

POINTS = 1_000_000
OPENED = 9
REDRAWN = 20
HEARD = 10
UPDATES = 1000
BEAT_MS = 2000
TALL = {"width": 1280, "height": 2400}

WATCHED = """
globalThis.at = {};
const once = (name, found) => {
  if (name in globalThis.at || !found()) return;
  globalThis.at[name] = null;
  requestAnimationFrame(() => setTimeout(() => { globalThis.at[name] = performance.now(); }));
};
new MutationObserver(() => {
  once('text', () => document.querySelector('.sentence')?.textContent);
  once('curve', () => document.querySelector('figure .js-line')?.getAttribute('d'));
}).observe(document, { subtree: true, childList: true, characterData: true, attributes: true });
"""
"""Notes when the frame behind the first text, and behind the first curve, was made."""

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
    chromium = shutil.which("chromium")
    if chromium is None:
        print("skipped: there is no chromium")
        return
    print(machine(), flush=True)
    with bench() as (service, small, large), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        print(f"chromium {browser.version}", flush=True)
        for figure in figures(browser, service, small, large):
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


def figures(browser: Any, service: Served, small: Agent, large: Agent) -> Iterator[Figure]:
    """Every row of the table."""
    at = [opened(browser, f"{service.url}/jobs/{small.job_id}") for _ in range(OPENED)][1:]
    yield Figure(f"text painted, nothing in the cache, median of {OPENED - 1}", _median(at, "text"), "ms", 300)
    at = [opened(browser, f"{service.url}/jobs/{large.job_id}") for _ in range(OPENED)][1:]
    yield Figure(f"a run of {POINTS:,} points: text", _median(at, "text"), "ms", 300)
    yield Figure(f"a run of {POINTS:,} points: curve drawn", _median(at, "curve"), "ms", 1000)
    yield redrawn(browser, f"{service.url}/jobs/{large.job_id}?tab=metrics")
    with Wire(service.url, small.token) as wire:
        yield heard(browser, service, small, wire)
        yield from grown(browser, service, small, wire)


def _median(at: list[dict[str, float]], name: str) -> float:
    return quantile([one[name] for one in at], 0.5)


def opened(browser: Any, url: str) -> dict[str, float]:
    """ms from the request for the page to its text and its curve, in a browser that has seen nothing of it."""
    page = browser.new_page()
    page.add_init_script(WATCHED)
    page.goto(url)
    page.wait_for_function("() => globalThis.at.text && globalThis.at.curve")
    found: dict[str, float] = page.evaluate("globalThis.at")
    page.close()
    return found


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
