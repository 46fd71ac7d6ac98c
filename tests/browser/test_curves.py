"""Curves that do not mislead: smoothing, the range of the y axis, the level rule, and saving of charts."""

import csv
import io
import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright", reason="playwright is not installed")

from playwright.sync_api import Locator, Page, expect

from tests.browser.page_checks import check_both_themes
from tests.browser.test_charts import figure
from tests.service.harness import ServiceHarness
from tests.service.live_server import served

pytestmark = pytest.mark.long

STEPS = 400
SPIKE = 250


@dataclass
class Runs:
    rig: ServiceHarness
    jobs: list[str]
    url: str


@pytest.fixture
def runs(rig: ServiceHarness) -> Iterator[Runs]:
    """Two runs with a cliff at the start; the first has a spike later."""
    dice = random.Random(4)
    jobs = []
    for name, offset in (("low", 0.0), ("high", 0.4)):
        job_id, attempt = rig.running(steps=STEPS, name=name)
        for step in range(1, STEPS + 1):
            loss = 3 + offset + 6 * math.exp(-step / 8) + 1.5 * math.exp(-step / 100) + dice.gauss(0, 0.02)
            spike = 2.5 if step == SPIKE and not offset else 0.0
            attempt.metric(step, loss=loss + spike, tokens=step * 1000)
        rig.ship(attempt)
        jobs.append(job_id)
    with served(rig) as (host, port):
        yield Runs(rig, jobs, f"http://{host}:{port}")


def y_range(chart: Locator) -> list[float]:
    plot = chart.locator(".plot")
    # The note under a chart is there before its lines.
    chart.page.wait_for_function("node => node._fullLayout?.yaxis", arg=plot.element_handle())
    found: list[float] = plot.evaluate("node => node._fullLayout.yaxis.range")
    return found


def line(chart: Locator, uid: str) -> list[float]:
    found: list[float] = chart.locator(".plot").evaluate("(node, uid) => node.data.find(one => one.uid === uid).y", uid)
    return found


def module(page: Page, name: str) -> str:
    """Return the URL of a script of the page."""
    address = page.locator(f'link[rel="modulepreload"][href$="/{name}"]').get_attribute("href")
    assert address is not None
    return address


def test_first_steps_do_not_flatten_the_rest_and_a_spike_is_shown(runs: Runs, page: Page) -> None:
    page.goto(f"{runs.url}/jobs/{runs.jobs[0]}")
    chart = figure(page, "Train loss")
    expect(chart).to_contain_text(re.compile(r"first \d+ points above, up to 9\.\d+"))
    rows = runs.rig.data(runs.jobs[0], "metrics", fields="loss")
    spike = next(row["loss"] for row in rows if row["step"] == SPIKE)
    low, high = y_range(chart)
    assert low < 3.1
    assert spike < high < 7 < max(row["loss"] for row in rows)
    whole = chart.get_by_role("button", name="full range")
    whole.click()
    expect(whole).to_have_attribute("aria-pressed", "true")
    page.wait_for_function("() => document.querySelector('.plot')._fullLayout.yaxis.range[1] > 9")
    expect(chart).not_to_contain_text("points above")
    whole.click()
    page.wait_for_function("() => document.querySelector('.plot')._fullLayout.yaxis.range[1] < 7")
    chart.get_by_role("button", name="log").click()
    expect(whole).to_be_hidden()


def test_no_spike_is_ever_above_the_range(runs: Runs, page: Page) -> None:
    """Random curves with spikes, also during the first steps: of the falling part alone something may be left out."""
    page.goto(f"{runs.url}/jobs/{runs.jobs[0]}")
    curves, spikes = [], []
    for seed in range(200):
        dice = random.Random(seed)
        count = dice.randrange(2, 300)
        ys = [2 + 8 * math.exp(-i / dice.uniform(3, 6)) + dice.gauss(0, 0.05) for i in range(count)]
        at = dice.randrange(1, count)
        # Above all points before it but those of the start, as a spike is.
        ys[at] = ys[at - 1] + dice.uniform(0.6, 6)
        curves.append(ys)
        spikes.append(ys[at])
    tops = page.evaluate(
        """async ([address, curves]) => {
          const { cliffTop } = await import(address);
          return curves.map((y) => cliffTop([{ x: y.map((_, i) => i), y, falls: true }]));
        }""",
        [module(page, "chart-data.js"), curves],
    )
    assert sum(top is not None for top in tops) > 20, "the cliff of some is left out"
    for seed, (top, spike) in enumerate(zip(tops, spikes, strict=True)):
        assert top is None or spike <= top["top"], seed


def test_smoothing_does_not_lag_and_the_running_mean_is_a_choice(runs: Runs, page: Page) -> None:
    page.goto(f"{runs.url}/jobs/{runs.jobs[0]}")
    chart = figure(page, "Train loss")
    expect(chart).to_contain_text("smoothed over 2 steps")
    page.get_by_label("Smoothing").select_option(label="centred, 50 steps")
    expect(chart).to_contain_text("smoothed over 50 steps")
    assert "smooth=50" in page.url
    smoothed, losses = line(chart, "smoothed"), line(chart, "last")
    assert abs(smoothed[-1] - losses[-1]) < 0.1, "at the end they agree"
    page.get_by_label("Smoothing").select_option(label="running mean, 50 steps")
    expect(chart).to_contain_text("running mean, half-life 50 steps: it lags")
    lagging = line(chart, "smoothed")
    assert all(mean > value for mean, value in zip(lagging[100:200], smoothed[100:200], strict=True))
    page.reload()
    expect(page.get_by_label("Smoothing")).to_have_value("mean-50")
    page.get_by_label("Smoothing").select_option("0")
    # After a reload the choice is shown before the lines are.
    page.wait_for_function(
        "() => { const d = document.querySelector('.plot').data, y = (u) => d.find((one) => one.uid === u).y;"
        " return d && y('smoothed').every((value, i) => value === y('last')[i]); }"
    )


def reached(page: Page) -> list[list[str]]:
    return [row.locator("th, td").all_inner_texts() for row in page.locator(".reached tbody tr").all()]


def expected_step(rows: list[dict[str, Any]], level: float) -> int:
    """Return the first step at which the straight lines between the points are at or below ``level``."""
    before = rows[0]
    for row in rows:
        if row["loss_smooth"] <= level:
            fall = before["loss_smooth"] - row["loss_smooth"]
            part = (before["loss_smooth"] - level) / fall if fall else 1.0
            step: float = before["step"] + part * (row["step"] - before["step"])
            return math.ceil(step)
        before = row
    raise AssertionError(level)


def test_the_level_rule_is_dragged_and_moved_by_keys(runs: Runs, page: Page) -> None:
    page.goto(f"{runs.url}/compare?jobs={','.join(runs.jobs)}")
    chart = figure(page, "Train loss")
    expect(chart.locator(".scatterlayer .trace")).to_have_count(2)
    chart.get_by_role("button", name="level").click()
    rule = page.get_by_role("slider", name="Level of Train loss")
    expect(rule).to_be_focused()
    begin = float(rule.get_attribute("aria-valuenow") or "nan")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("PageDown")
    moved = float(rule.get_attribute("aria-valuenow") or "nan")
    bottom, top = y_range(chart)
    assert begin - moved == pytest.approx(0.11 * (top - bottom), abs=0.01)
    box = rule.bounding_box()
    assert box is not None
    at = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.move(*at)
    page.mouse.down()
    page.mouse.move(at[0], at[1] + 40, steps=5)
    page.mouse.up()
    level = float(rule.get_attribute("aria-valuenow") or "nan")
    assert level < moved - 0.1
    assert "zoom=" not in page.url, "to drag the rule is not to zoom"
    assert f"level={level:g}" in page.url
    names = [row[0] for row in reached(page)]
    assert names == ["low", "high"]
    page.goto(f"{runs.url}/compare?jobs={','.join(runs.jobs)}&level=3.3")
    expect(page.locator(".reached tbody tr")).to_have_count(2)
    query = {"max_points": 1000, "smooth_width": "auto"}
    step = expected_step(runs.rig.data(runs.jobs[0], "metrics", **query), 3.3)
    low, high = reached(page)
    assert low[:2] == ["low", f"{step}"]
    assert high[0] == "high"
    assert high[1].startswith("not reached, lowest 3.4")
    assert rule.get_attribute("aria-valuetext") == f"3.300: low at step {step}, high not reached"
    check_both_themes(page, "level")
    rule.focus()
    page.keyboard.press("Escape")
    expect(rule).to_be_hidden()
    assert "level=" not in page.url


def test_a_chart_is_saved_as_picture_and_values(runs: Runs, page: Page) -> None:
    page.goto(f"{runs.url}/jobs/{runs.jobs[0]}?smooth=10")
    chart = figure(page, "Train loss")
    expect(chart.locator(".nsewdrag").first).to_be_visible()
    saved = {}
    for kind, words in (("png", "Save as PNG"), ("svg", "Save as SVG"), ("csv", "Save the values as CSV")):
        if kind == "png":
            chart.get_by_role("button", name="Save Train loss").click()
        else:
            chart.locator(".plotbox").click(button="right")
        with page.expect_download() as found:
            chart.get_by_role("button", name=words).click()
        assert found.value.suggested_filename == f"low-train-loss.{kind}"
        saved[kind] = Path(found.value.path()).read_bytes()
    assert saved["png"].startswith(b"\x89PNG\r\n")
    assert saved["svg"].startswith(b"<svg")
    assert b"Train loss" in saved["svg"]
    rows = list(csv.DictReader(io.StringIO(saved["csv"].decode())))
    expected = runs.rig.data(runs.jobs[0], "metrics", max_points=1000, smooth_width=10)
    assert [int(row["step"]) for row in rows] == [row["step"] for row in expected]
    for row, ours in zip(rows, expected, strict=True):
        assert float(row["smoothed"]) == pytest.approx(ours["loss_smooth"])
        assert float(row["last"]) == pytest.approx(ours["loss"])
    menu = chart.get_by_role("button", name="Save Train loss")
    menu.focus()
    page.keyboard.press("Enter")
    expect(chart.get_by_role("button", name="Save as PNG")).to_be_focused()
    page.keyboard.press("ArrowDown")
    expect(chart.get_by_role("button", name="Save as SVG")).to_be_focused()
    check_both_themes(page, "save-menu")
    chart.get_by_role("button", name="Save as SVG").focus()
    page.keyboard.press("Escape")
    expect(menu).to_be_focused()
    expect(chart.get_by_role("button", name="Save as PNG")).to_be_hidden()
