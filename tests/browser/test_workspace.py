"""The jobs page as a workspace: columns, chosen curves, folded seeds, a thousand jobs, keys, notifications."""

import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

pytest.importorskip("playwright", reason="playwright is not installed")

from playwright.sync_api import Locator, Page, expect
from sqlalchemy import insert, select

from tests.browser.page_checks import check_both_themes
from tests.browser.test_jobs_and_system import names, rows
from tests.fakes.launcher import FakeAttempt
from tests.service.harness import ServiceHarness
from tests.service.live_server import served
from trainyard.service.db.models import JobRow
from trainyard.service.ids import new_id

pytestmark = pytest.mark.long

RATES = {"low": 1e-4, "high": 1e-3}


@dataclass
class Sweep:
    """Two learning rates with two seeds each, named like ``low-s1``, and one run that is at step 20 of 1000."""

    rig: ServiceHarness
    url: str
    ids: dict[str, str]
    running: FakeAttempt


def loss(name: str, step: int) -> float:
    rate, seed = name.split("-s")
    return (4.0 if rate == "low" else 3.0) + 4 * math.exp(-step / (12 if rate == "low" else 8)) + int(seed) / 5


@pytest.fixture
def sweep(rig: ServiceHarness) -> Iterator[Sweep]:
    ids = {}
    for rate, seed in (("low", 1), ("low", 2), ("high", 1), ("high", 2)):
        name = f"{rate}-s{seed}"
        training = {"learning_rate": RATES[rate], "seed": seed}
        ids[name], attempt = rig.running(steps=40, name=name, group="sweep", training=training)
        for step in range(1, 41):
            attempt.metric(step, loss=loss(name, step), tokens=step * 100, eval_loss=loss(name, step))
        rig.exit(attempt, "completed", step=40)
    ids["alone"], running = rig.running(steps=1000, name="alone", training={"optimizer": "muon"})
    for step in range(1, 21):
        running.metric(step, loss=5.0, tokens=step * 100)
    rig.ship(running)
    with served(rig) as (host, port):
        yield Sweep(rig, f"http://{host}:{port}", ids, running)


def train_loss(page: Page) -> Locator:
    return page.get_by_role("group", name=re.compile("^Train loss"))


def wait_for_lines(page: Page, *expected: str) -> dict[str, dict[str, Any]]:
    """Wait until the loss chart has exactly these traces; return their x and y values, colors and dashes by name."""
    page.wait_for_function(
        "names => JSON.stringify(document.querySelector('.plot')?.data?.map((one) => one.uid)) === names",
        arg=str(list(expected)).replace("'", '"').replace(" ", ""),
    )
    found: list[dict[str, Any]] = page.locator(".plot").first.evaluate(
        "node => node.data.map(({ uid, x, y, line, fill }) => ({ uid, x, y, line, fill }))"
    )
    return {one["uid"]: one for one in found}


def choose(page: Page, name: str) -> Locator:
    return page.get_by_role("checkbox", name=f"Choose {name}", exact=True)


def row(page: Page, name: str) -> Locator:
    return rows(page).filter(has=page.locator(".name", has_text=re.compile(rf"^\S?{re.escape(name)}$")))


def test_chosen_jobs_are_drawn_live_and_keep_their_colors(sweep: Sweep, page: Page) -> None:
    low, high, alone = (sweep.ids[name] for name in ("low-s1", "high-s1", "alone"))
    page.goto(sweep.url)
    choose(page, "low-s1").check()
    choose(page, "high-s1").check()
    choose(page, "alone").check()
    lines = wait_for_lines(page, low, high, alone)
    assert [lines[one]["x"][-1] for one in (low, high, alone)] == [4000, 4000, 2000], "by tokens"
    swatch = row(page, "high-s1").locator(".swatch")
    expect(swatch).to_have_css("border-top-color", "rgb(213, 94, 0)")
    assert lines[high]["line"]["color"] == "#D55E00"
    choose(page, "low-s1").uncheck()
    lines = wait_for_lines(page, high, alone)
    assert lines[high]["line"]["color"] == "#D55E00", "the colour stays when another job is removed"
    differing = page.get_by_role("region", name="Differing settings")
    expect(differing.get_by_role("row").filter(has_text="training.optimizer")).to_contain_text("muon")
    for step in range(21, 31):
        sweep.running.metric(step, loss=5.0, tokens=step * 100)
    sweep.rig.ship(sweep.running)
    page.wait_for_function(
        "id => document.querySelector('.plot').data.find((one) => one.uid === id).x.at(-1) === 3000", arg=alone
    )
    page.get_by_label("X axis").select_option("step")
    page.wait_for_function("() => document.querySelector('.plot').data[0].x.at(-1) === 40")
    check_both_themes(page, "workspace")
    page.reload()
    lines = wait_for_lines(page, high, alone)
    assert lines[high]["line"]["color"] == "#D55E00"
    assert lines[high]["x"][-1] == 40
    expect(choose(page, "high-s1")).to_be_checked()
    page.get_by_role("button", name="Clear").click()
    expect(page.locator(".curves")).to_be_hidden()
    assert "jobs=" not in page.url


def test_seeds_fold_to_a_mean_with_a_band(sweep: Sweep, page: Page) -> None:
    page.goto(f"{sweep.url}/?smooth=0&x=step")
    page.get_by_label("Fold").select_option("over seeds")
    expect(rows(page)).to_have_count(3)
    assert [name.strip("▸▾") for name in names(page)] == ["alone", "high", "low"]
    expect(row(page, "low")).to_contain_text("2 jobs")
    head = page.get_by_role("columnheader", name="Score")
    head.get_by_role("button").click()
    expect(rows(page).locator(".name").first).to_contain_text("high")
    expect(rows(page).first).to_contain_text(f"{(loss('high-s1', 40) + loss('high-s2', 40)) / 2:.3f}")
    row(page, "low").get_by_role("button").click()
    expect(rows(page)).to_have_count(5)
    choose(page, "low").check()
    expect(choose(page, "low-s1")).to_be_checked()
    page.wait_for_function("() => document.querySelector('.plot')?.data?.length === 3")
    key = page.evaluate("document.querySelector('.plot').data[2].uid")
    lines = wait_for_lines(page, f"{key}-low", f"{key}-high", key)
    steps = range(1, 41)
    for uid, expected in (
        (key, [(loss("low-s1", step) + loss("low-s2", step)) / 2 for step in steps]),
        (f"{key}-low", [loss("low-s1", step) for step in steps]),
        (f"{key}-high", [loss("low-s2", step) for step in steps]),
    ):
        assert lines[uid]["x"] == list(steps)
        assert lines[uid]["y"] == pytest.approx(expected)
    assert lines[f"{key}-high"]["fill"] == "tonexty"
    check_both_themes(page, "folded")
    choose(page, "low-s2").uncheck()
    wait_for_lines(page, sweep.ids["low-s1"])
    expect(choose(page, "low")).to_have_js_property("indeterminate", True)
    page.get_by_label("Fold").select_option("by group")
    expect(rows(page)).to_have_count(2)
    page.reload()
    expect(rows(page)).to_have_count(2)
    expect(row(page, "sweep")).to_contain_text("4 jobs")


def test_a_mean_of_which_a_part_is_missing_is_dotted(sweep: Sweep, page: Page) -> None:
    """A run that ended early leaves the mean; its absence is visible, because the mean jumps there."""
    rig = sweep.rig
    short, attempt = rig.running(steps=40, name="low-s3", group="sweep", training={"learning_rate": 1e-4, "seed": 3})
    for step in range(1, 11):
        attempt.metric(step, loss=loss("low-s3", step), tokens=step * 100)
    rig.exit(attempt, "crashed", step=10)
    chosen = ",".join([sweep.ids["low-s1"], sweep.ids["low-s2"], short])
    page.goto(f"{sweep.url}/?smooth=0&x=step&fold=seeds&jobs={chosen}")
    page.wait_for_function("() => document.querySelector('.plot')?.data?.length === 4")
    solid, dotted = page.locator(".plot").first.evaluate("node => node.data.slice(2).map((one) => one.y)")
    assert solid[:10] == pytest.approx([loss("low-s2", step) for step in range(1, 11)])
    assert solid[10:] == [None] * 30
    assert dotted[:9] == [None] * 9
    assert dotted[9:] == pytest.approx(
        [loss("low-s2", 10), *((loss("low-s1", step) + loss("low-s2", step)) / 2 for step in range(11, 41))]
    )
    expect(train_loss(page)).to_contain_text("dotted: not all of them are there")


def test_columns_are_chosen_among_values_and_differing_settings(sweep: Sweep, page: Page) -> None:
    page.goto(sweep.url)
    expect(rows(page)).to_have_count(5)
    page.get_by_text("Columns", exact=True).click()
    menu = page.locator(".chooser-panel")
    offered = menu.locator(".chooser-list").last.locator("label")
    expect(offered.filter(has_text="training.seed")).to_be_visible()
    expect(offered.filter(has_text="training.batch_size")).to_have_count(0)
    menu.get_by_label("training.seed").check()
    menu.get_by_label("Learning rate").check()
    menu.get_by_label("Curve").uncheck()
    check_both_themes(page, "columns")
    page.keyboard.press("Escape")
    expect(menu).to_be_hidden()
    head = page.get_by_role("columnheader")
    expect(head.filter(has_text="Curve")).to_have_count(0)
    expect(row(page, "low-s2").locator("td").last).to_have_text("1e-4")
    head.filter(has_text="seed").get_by_role("button").click()
    expect(rows(page).locator(".name")).to_have_text(["high-s1", "low-s1", "high-s2", "low-s2", "alone"])
    page.reload()
    expect(rows(page).locator(".name")).to_have_text(["high-s1", "low-s1", "high-s2", "low-s2", "alone"])
    expect(head.filter(has_text="seed")).to_have_attribute("aria-sort", "ascending")


def test_charts_without_a_point_are_only_named(sweep: Sweep, page: Page) -> None:
    page.goto(f"{sweep.url}/?jobs={sweep.ids['alone']}")
    wait_for_lines(page, sweep.ids["alone"])
    expect(page.get_by_text("No points of these jobs yet: ")).to_contain_text("Gradient norm")
    expect(page.get_by_role("group", name=re.compile("^Gradient norm"))).to_be_hidden()
    expect(page.get_by_role("group", name=re.compile("^Tokens.s"))).to_be_visible()


def test_a_discarded_job_can_be_chosen_by_address_only(sweep: Sweep, page: Page) -> None:
    sweep.rig.client.patch(f"/jobs/{sweep.ids['low-s1']}", json={"discarded": True})
    page.goto(f"{sweep.url}/?jobs={sweep.ids['low-s1']},job_gone")
    expect(rows(page)).to_have_count(4)
    wait_for_lines(page, sweep.ids["low-s1"])
    expect(page.get_by_text("Not found: job_gone")).to_be_visible()


def test_keys_move_choose_open_compare_and_search(sweep: Sweep, page: Page) -> None:
    page.goto(sweep.url)
    expect(rows(page)).to_have_count(5)
    page.keyboard.press("j")
    expect(choose(page, "alone")).to_be_focused()
    page.keyboard.press("j")
    expect(choose(page, "high-s2")).to_be_focused()
    page.keyboard.press("x")
    expect(choose(page, "high-s2")).to_be_checked()
    page.keyboard.press("k")
    page.keyboard.press("x")
    expect(choose(page, "alone")).to_be_checked()
    page.keyboard.press("?")
    dialog = page.get_by_role("dialog", name="Keys")
    expect(dialog.get_by_role("row")).to_have_count(7)
    check_both_themes(page, "keys")
    dialog.get_by_label("Use single keys").uncheck()
    dialog.get_by_role("button", name="Close").click()
    page.keyboard.press("/")
    expect(page.get_by_label("Search")).not_to_be_focused()
    page.keyboard.press("?")
    dialog.get_by_label("Use single keys").check()
    page.keyboard.press("Escape")
    page.keyboard.press("/")
    expect(page.get_by_label("Search")).to_be_focused()
    page.keyboard.type("c")
    assert "/compare" not in page.url, "a text field gets its keys"
    expect(page).to_have_url(re.compile("search=c"))
    page.get_by_label("Search").fill("")
    page.get_by_label("Search").blur()
    # The address follows the field a moment later.
    expect(page).not_to_have_url(re.compile("search="))
    expect(choose(page, "alone")).to_be_checked()
    page.keyboard.press("c")
    page.wait_for_url(re.compile(f"/compare\\?jobs={sweep.ids['high-s2']},{sweep.ids['alone']}$"))
    page.go_back()
    expect(choose(page, "alone")).to_be_checked()
    choose(page, "high-s1").focus()
    page.keyboard.press("o")
    page.wait_for_url(re.compile(f"/jobs/{sweep.ids['high-s1']}$"))


def test_actions_on_all_chosen_jobs(sweep: Sweep, page: Page) -> None:
    chosen = [sweep.ids[name] for name in ("low-s1", "low-s2", "alone")]
    page.goto(f"{sweep.url}/?jobs={','.join(chosen)}")
    button = page.get_by_role("button", name="Actions on the chosen jobs")
    button.click()
    menu = page.get_by_role("group", name="Actions on the chosen jobs")
    expect(menu.get_by_role("button", name="Pause: 1 job")).to_be_visible()
    expect(menu.get_by_role("button", name="Resume", disabled=True)).to_contain_text("no chosen job")
    check_both_themes(page, "bulk-actions")
    menu.get_by_role("button", name="Discard: hide from lists: 3 jobs").click()
    expect(page.locator("#toast")).to_have_text("Discard: hide from lists: 3 of 3")
    assert all(sweep.rig.job(job_id)["discarded"] for job_id in chosen)
    expect(rows(page)).to_have_count(2)
    button.click()
    menu.get_by_role("button", name="Cancel: 1 job").click()
    page.get_by_role("dialog").get_by_role("button", name="Back").click()
    assert sweep.rig.job(sweep.ids["alone"])["desired"] == "run"
    button.click()
    menu.get_by_role("button", name="Cancel: 1 job").click()
    page.get_by_role("dialog").get_by_role("button", name="cancel").click()
    expect(page.locator("#toast")).to_have_text("Cancel: 1 of 1")
    assert sweep.rig.job(sweep.ids["alone"])["desired"] != "run"


NOTIFICATIONS = """
window.shown = [];
window.asked = 0;
window.Notification = class extends EventTarget {
  static permission = sessionStorage.getItem('permission') ?? 'default';
  static async requestPermission() {
    window.asked += 1;
    sessionStorage.setItem('permission', 'granted');
    return (Notification.permission = 'granted');
  }
  constructor(title, options) { super(); window.shown.push([title, options.tag]); }
};"""


CHECK = "fields=summary"
"""Part of the address by which the page asks for the watched jobs."""


def test_the_end_of_a_watched_job_is_notified_once(sweep: Sweep, page: Page) -> None:
    page.clock.install()
    page.add_init_script(NOTIFICATIONS)
    page.goto(sweep.url)
    choose(page, "low-s1").check()
    expect(page.get_by_role("button", name="Compare")).to_be_hidden()
    expect(page.get_by_role("button", name="Notify me at the end")).to_be_hidden()
    choose(page, "alone").check()
    page.get_by_role("button", name="Notify me at the end").click()
    expect(page.get_by_role("button", name="Do not notify me")).to_be_visible()
    page.get_by_role("button", name="Do not notify me").click()
    page.get_by_role("button", name="Notify me at the end").click()
    expect(page.get_by_text("You will be notified when the job ends")).to_be_visible()
    assert page.evaluate("window.asked") == 1
    page.goto(f"{sweep.url}/system")
    expect(page.get_by_role("heading", name="System")).to_be_visible()
    # From here on only the test moves the clock: the page checks every 15 s, and its message stays for 6 s.
    page.clock.pause_at(datetime.fromtimestamp(page.evaluate("Date.now()") / 1000, UTC) + timedelta(seconds=60))
    checks: list[str] = []
    page.on("requestfinished", lambda request: checks.append(request.url) if CHECK in request.url else None)

    def await_check() -> None:
        before = len(checks)
        page.clock.fast_forward(16_000)
        while len(checks) == before:
            page.wait_for_timeout(50)

    await_check()
    assert page.evaluate("window.shown") == []
    sweep.rig.exit(sweep.running, "completed", step=1000)
    page.clock.fast_forward(16_000)
    expect(page.locator("#toast")).to_contain_text("alone succeeded")
    assert page.evaluate("window.shown") == [["alone succeeded", sweep.ids["alone"]]]
    for _ in range(3):
        page.clock.fast_forward(16_000)
    assert page.evaluate("window.shown.length") == 1
    assert page.evaluate("localStorage.getItem('trainyard-watched')") == "{}", "nothing is left to check"


MANY = 1000


def add_jobs(rig: ServiceHarness, count: int) -> None:
    """Add finished jobs named ``many-0000``, ... with scores that fall, as copies of one that was submitted."""
    job_id, attempt = rig.running(steps=10, name="first")
    attempt.metric(10, loss=5.0, tokens=1000)
    rig.exit(attempt, "completed", step=10)
    with rig.database.write() as session:
        copied = dict(session.execute(select(*JobRow.__table__.c).where(JobRow.id == job_id)).one()._asdict())
        del copied["number"]
        for i in range(count):
            own = {"id": new_id("job"), "name": f"many-{i:04d}", "score": 10 - i / 1000, "group_name": f"g{i % 10}"}
            spec = {**copied["spec"], "training": {**copied["spec"]["training"], "seed": i}}
            session.execute(insert(JobRow), [{**copied, **own, "spec": spec}])


SCROLL = """async () => {
  const box = document.querySelector('.runs');
  const made = new Set();
  for (let i = 0; i < 60; i += 1) {
    box.scrollTop += 700;
    await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
    for (const row of document.querySelectorAll('.jobs tr')) made.add(row);
  }
  return made.size;
}"""
"""Scrolls through the table, and returns how many elements its rows were. The benchmark measures how long it takes."""


@pytest.mark.long
def test_a_thousand_jobs_are_listed_by_few_requests_and_scroll(rig: ServiceHarness, page: Page) -> None:
    add_jobs(rig, MANY)
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url) if "/jobs?" in request.url else None)
    with served(rig) as (host, port):
        page.goto(f"http://{host}:{port}/?columns=status,score,group,training.seed")
        expect(page.get_by_text("1,001 jobs", exact=True)).to_be_visible()
        assert len([url for url in requests if "fields=summary" not in url]) == 11
        assert rows(page).count() < 60
        first = rows(page).locator(".name").first
        expect(first).to_have_text("many-0999")
        page.get_by_role("columnheader", name="seed").get_by_role("button").click()
        expect(first).to_have_text("many-0000")
        assert page.evaluate(SCROLL) < 60, "rows that leave the view show those that enter it"
        page.locator(".runs").evaluate("node => (node.scrollTop = node.scrollHeight)")
        expect(rows(page).locator(".name").last).to_have_text("many-0999")
        assert rows(page).last.get_attribute("aria-rowindex") == "1002"
        page.get_by_label("Search").fill("many-05")
        expect(page.get_by_text("100 of 1,001 jobs")).to_be_visible()
        page.get_by_label("Group").select_option("g7")
        expect(page.get_by_text("10 of 1,001 jobs")).to_be_visible()
        page.get_by_label("Search").fill("")
        page.get_by_label("Group").select_option("")
        page.get_by_label("Fold").select_option("by group")
        expect(rows(page)).to_have_count(11)


SHOWN = """() => [...document.querySelectorAll('.jobs tr')].map((row) =>
  [Number(row.ariaRowIndex), row.querySelector('.name').textContent, row.querySelector('td.num').textContent])"""
"""Position, name and score of each row in the document."""

SCROLL_TO = """async (top) => {
  document.querySelector('.runs').scrollTop = top;
  await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
}"""


@pytest.mark.parametrize("seed", [1])
def test_rows_are_used_again_while_scrolling_and_keep_what_belongs_to_a_job(
    rig: ServiceHarness, page: Page, seed: int
) -> None:
    add_jobs(rig, 300)
    dice = random.Random(seed)
    with served(rig) as (host, port):
        page.goto(f"http://{host}:{port}/?columns=score&sort=score")
        expect(page.get_by_text("301 jobs", exact=True)).to_be_visible()
        # The job that was submitted has the lowest score.
        expected = [(2 + i, f"many-{300 - i:04d}" if i else "first") for i in range(301)]
        created = page.evaluate("() => (window.made = new Set(document.querySelectorAll('.jobs tr'))).size")
        for top in [0, 300, 9000, *(dice.randrange(0, 301 * 46) for _ in range(20)), 60]:
            page.evaluate(SCROLL_TO, top)
            shown = page.evaluate(SHOWN)
            begin = shown[0][0] - 2
            assert [(position, name) for position, name, _ in shown] == expected[begin : begin + len(shown)], seed
            scores = [score for _, name, score in shown if name != "first"]
            assert scores == [f"{10 - int(name[5:]) / 1000:.3f}" for _, name, _ in shown if name != "first"], seed
        assert (
            page.evaluate("() => new Set([...window.made, ...document.querySelectorAll('.jobs tr')]).size") == created
        )
        # The box and the focus stay with the job while its row is in the document.
        box = page.get_by_label("Choose many-0295")
        box.check()
        box.focus()
        page.evaluate(SCROLL_TO, 230)
        expect(box).to_be_focused()
        expect(page.locator(".jobs input:checked")).to_have_count(1)
        page.evaluate(SCROLL_TO, 9000)
        assert page.evaluate("document.activeElement.tagName") == "BODY", "no other job gets the focus"
        expect(page.locator(".jobs input:checked")).to_have_count(0)
        page.evaluate(SCROLL_TO, 0)
        expect(box).to_be_checked()
        expect(page.locator(".jobs input:checked")).to_have_count(1)


def test_polls_that_bring_nothing_new_draw_no_chart(sweep: Sweep, page: Page) -> None:
    sweep.rig.exit(sweep.running, "completed", step=20)
    page.goto(f"{sweep.url}/?jobs={sweep.ids['low-s1']},{sweep.ids['high-s1']}")
    expect(page.locator("figure .js-line").nth(1)).to_be_attached()

    def await_poll() -> None:
        with page.expect_response(lambda response: "/jobs?" in response.url):
            pass

    await_poll()  # It begins after the charts of the one before are drawn.
    page.evaluate("() => { const { react } = Plotly; window.drawn = 0;"
                  " Plotly.react = (...given) => { window.drawn += 1; return react(...given); }; }")  # fmt: skip
    await_poll()
    await_poll()
    assert page.evaluate("window.drawn") == 0
    page.get_by_label("Choose low-s2").check()
    page.wait_for_function("() => window.drawn > 0")
