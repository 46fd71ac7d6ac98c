"""Charts of a job: events of a run, and zoom and scroll position that survive updates."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

pytest.importorskip("playwright", reason="playwright is not installed")

from playwright.sync_api import Locator, Page, Request, expect

from tests.browser.page_checks import check_both_themes
from tests.fakes.launcher import FakeAttempt
from tests.service.harness import ServiceHarness
from tests.service.live_server import served


def say(attempt: FakeAttempt, steps: range, lift: float = 0.0) -> None:
    for step in steps:
        attempt.metric(
            step,
            loss=None if step == 30 else 2 + 6 / (1 + step / 20) + lift + (step % 5) / 20,
            nonfinite=step == 30,
            learning_rate=step / 1000,
            grad_norm=0.0 if step == 2 else 1 + 3 / step,
            tokens=step * 2048,
            step_seconds=0.1 + (step % 7) / 200,
            data_seconds=0.002,
            memory_bytes=61_000_000_000,
            eval_loss=2.2 + 6 / (1 + step / 20) if step % 20 == 0 else None,
        )


@dataclass
class Run:
    rig: ServiceHarness
    attempt: FakeAttempt
    url: str


@pytest.fixture
def run(rig: ServiceHarness) -> Iterator[Run]:
    """A run that was killed at step 60, resumed from its checkpoint at 40, and is at step 80."""
    job_id, first = rig.running(steps=400, name="curves")
    say(first, range(1, 41))
    rig.checkpoint(job_id, first, 40)
    say(first, range(41, 61), lift=0.4)
    rig.exit(first, "killed", step=60)
    if rig.job(job_id)["restart_at"]:
        rig.clock.forward(3600)
    second = rig.next_attempt(job_id, 2, start_step=40, steps=400)
    say(second, range(41, 81))
    second.say("warning", code="loss_spike", message="the loss rose to 5.1 at step 70", step=70)
    rig.ship(second)
    with served(rig) as (host, port):
        yield Run(rig, second, f"http://{host}:{port}/jobs/{job_id}")


def figure(page: Page, name: str) -> Locator:
    return page.get_by_role("group", name=re.compile(f"^{name}"))


def zoomed(page: Page) -> list[float]:
    found: list[float] = (
        figure(page, "Train loss")
        .locator(".js-plotly-plot")
        .first.evaluate("node => [...node.layout.xaxis.range].map(Number)")
    )
    return found


def drag(page: Page, chart: Locator, begin: float, end: float) -> None:
    """Drag across the middle of a chart between two fractions of its width."""
    # Plotly takes the new width of the window a moment later. Fractions of the old width would be wrong.
    page.wait_for_function(
        "node => Math.abs(node._fullLayout?.width - node.getBoundingClientRect().width) < 2",
        arg=chart.locator(".plot").first.element_handle(),
    )
    box = chart.locator(".nsewdrag").first.bounding_box()
    assert box is not None
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + begin * box["width"], middle)
    page.mouse.down()
    page.mouse.move(box["x"] + end * box["width"], middle, steps=4)
    page.mouse.up()


def test_loss_chart_shows_the_events_of_a_run(run: Run, page: Page) -> None:
    broken: list[str] = []
    page.on("pageerror", lambda error: broken.append(str(error)))
    page.goto(run.url)
    chart = figure(page, "Train loss")
    expect(chart).to_have_attribute("aria-label", re.compile(r"^Train loss, step 1 to 80, now \d\.\d{3}$"))
    for words in (
        "1 point = 1 step",
        "✕ 1 not finite",
        "◆ evaluation",
        "new attempt",
        "superseded steps",
        "alert",
        "checkpoint",
    ):
        expect(chart).to_contain_text(words)
    lines = chart.locator(".js-plotly-plot").first.evaluate(
        "node => node.data.map(one => [one.uid, one.type, one.x.length])"
    )
    known = {uid: points for uid, _, points in lines}
    assert {kind for _, kind, _ in lines} == {"scatter"}
    assert (known["smoothed"], known["eval"], known["bad"], known["old-1"]) == (80, 4, 1, 20)
    assert chart.locator(".js-plotly-plot").first.evaluate("node => node.layout.shapes.length") == 3
    expect(figure(page, "Gradient norm")).to_contain_text("1 not shown on a log axis")
    chart.get_by_role("button", name="log").click()
    expect(chart).to_contain_text("1 not shown on a log axis")
    chart.get_by_role("button", name="log").click()
    chart.get_by_role("button", name="data").click()
    expect(chart.get_by_role("region", name="Train loss as a table").get_by_role("row")).to_have_count(81)
    chart.get_by_role("button", name="data").click()
    for axis, words in (("tokens", "tokens"), ("active", " h"), ("clock", ":"), ("step", "step")):
        page.get_by_label("X axis").select_option(axis)
        # The values under the pointer belong to the axis that is drawn, and charts are drawn one after the other.
        page.wait_for_function(
            "axis => ['Train loss', 'Learning rate', 'Tokens/s'].every((name) =>"
            " document.querySelector(`figure[aria-label^='${name}'] .plot`)?.layout?.uirevision === axis)",
            arg=axis,
        )
        expect(figure(page, "Tokens.s").locator(".scatterlayer .trace")).to_have_count(1)
        page.mouse.move(5, 5)
        chart.locator(".nsewdrag").first.hover()
        expect(chart.locator(".readout")).to_contain_text(re.compile(f" at .*{words}"))
        expect(figure(page, "Learning rate").locator(".readout")).to_contain_text(re.compile(f" at .*{words}"))
        expect(figure(page, "Learning rate").locator(".crosshair")).to_be_visible()
    page.mouse.move(5, 5)
    expect(figure(page, "Learning rate").locator(".crosshair")).to_be_hidden()
    check_both_themes(page, "job-curves")
    assert broken == []


def test_nearly_constant_values_are_not_magnified(run: Run, page: Page) -> None:
    page.goto(run.url)
    # A dot, because a slash would end the pattern.
    plot = figure(page, "Tokens.s").locator(".js-plotly-plot").first
    expect(plot).to_be_visible()
    low, high = plot.evaluate("node => node._fullLayout.yaxis.range")
    assert low <= 900
    assert high >= 1100


def test_zoom_survives_updates_and_a_reload(run: Run, page: Page) -> None:
    page.goto(run.url)
    chart = figure(page, "Train loss")
    expect(chart.locator(".nsewdrag").first).to_be_visible()
    drag(page, chart, 0.25, 0.5)
    page.wait_for_url(re.compile("zoom="))
    before = zoomed(page)
    assert 10 < before[0] < before[1] < 60
    expect(figure(page, "Tokens.s").get_by_role("button", name="whole run")).to_be_visible()
    page.get_by_role("tab", name="config").focus()
    page.evaluate("scrollTo(0, 120)")
    say(run.attempt, range(81, 121))
    run.rig.ship(run.attempt)
    expect(page.locator(".facts")).to_contain_text("120 of 400")
    page.wait_for_function("() => document.querySelector('.js-plotly-plot').data.some(one => one.uid === 'smoothed')")
    assert zoomed(page) == before
    assert page.evaluate("[scrollY, document.activeElement.id]") == [120, "tab-config"]
    page.reload()
    expect(chart.locator(".nsewdrag").first).to_be_visible()
    page.wait_for_function("() => document.querySelector('.js-plotly-plot').layout.xaxis.autorange === false")
    assert [round(end) for end in zoomed(page)] == [round(end) for end in before]
    chart.get_by_role("button", name="whole run").click()
    expect(chart).to_have_attribute("aria-label", re.compile("step 1 to 120"))
    assert "zoom=" not in page.url
    assert zoomed(page)[1] > 110


def test_metrics_tab_draws_visible_charts_and_searches(run: Run, page: Page) -> None:
    page.goto(f"{run.url}?tab=metrics")
    panel = page.get_by_role("tabpanel")
    charts = panel.get_by_role("group")
    expect(charts).to_have_count(7)
    expect(page.get_by_role("group", name=re.compile("^(Train loss|Learning rate)"))).to_have_count(0)
    first, last = charts.first, panel.get_by_role("group", name=re.compile("^Epoch"))
    expect(first.locator(".scatterlayer .trace")).to_have_count(1)
    assert last.locator(".main-svg").count() == 0, "not visible yet, so not drawn"
    last.scroll_into_view_if_needed()
    expect(last.locator(".scatterlayer .trace")).to_have_count(1)
    expect(panel.get_by_text(re.compile("^Not reported by this run: .*Expert load"))).to_be_visible()
    expect(panel.get_by_role("group", name=re.compile("^Expert load"))).to_be_hidden()
    page.get_by_label("Search the charts").fill("memory")
    expect(charts).to_have_count(1)
    expect(charts.first).to_have_attribute("aria-label", re.compile("now 61.0 GB$"))
    assert "chart=memory" in page.url
    page.get_by_label("Search the charts").fill("")
    expect(charts).to_have_count(7)
    check_both_themes(page, "metrics")


def test_a_hidden_tab_sends_no_request(run: Run, page: Page) -> None:
    page.clock.install()
    under_way: set[Request] = set()
    # A stream ends only if the tab is hidden.
    page.on("request", lambda request: None if "/stream" in request.url else under_way.add(request))
    page.on("requestfinished", lambda request: under_way.discard(request))
    page.on("requestfailed", lambda request: under_way.discard(request))
    # The page's own load ends with this request. It is not one of a hidden tab.
    with page.expect_response(lambda response: "?parent=" in response.url):
        page.goto(run.url)
    expect(figure(page, "Train loss").locator(".nsewdrag").first).to_be_visible()
    page.evaluate("Object.defineProperty(document, 'hidden', { get: () => globalThis.away, configurable: true })")
    page.evaluate("globalThis.away = true; document.dispatchEvent(new Event('visibilitychange'))")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    # What was under way when the tab was hidden may still send a request.
    before = -1
    while under_way or before != len(asked):
        before = len(asked)
        page.wait_for_timeout(500)
    asked.clear()
    page.clock.fast_forward(30_000)
    say(run.attempt, range(81, 91))
    run.rig.ship(run.attempt)
    page.clock.fast_forward(30_000)
    assert asked == []
    page.evaluate("globalThis.away = false; document.dispatchEvent(new Event('visibilitychange'))")
    expect(page.locator(".facts")).to_contain_text("90 of 400")
    assert sum("stream" in url for url in asked) == 1
