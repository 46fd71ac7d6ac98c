"""The curve: stitched, by attempt, by pages, and in buckets."""

import csv
import io
import json
import math
import random
from typing import Any

import pytest

from tests.service.harness import ServiceHarness
from trainyard.contract.status import Reason
from trainyard.service.metrics.downsampling import (
    Aggregate,
    aggregate_of,
    bucket_width,
    to_buckets,
)


def curve(rig: ServiceHarness, job_id: str, **params: Any) -> list[tuple[int, int, float]]:
    return [(m["step"], m["attempt"], m["loss"]) for m in rig.data(job_id, "metrics", **params)]


def test_a_curve_over_attempts_has_each_step_once(any_rig: ServiceHarness) -> None:
    rig = any_rig
    job_id, first = rig.running()
    for step in range(1, 8):
        first.metric(step, loss=1.0 + step)
    rig.exit(first, "crashed", Reason.HUNG, step=7)
    rig.post_action(job_id, "resume")
    second = rig.next_attempt(job_id, 2, start_step=5)
    assert [s for s, _, _ in curve(rig, job_id)] == [1, 2, 3, 4, 5]
    for step in range(6, 10):
        second.metric(step, loss=2.0 + step)
    rig.exit(second, "crashed", Reason.HUNG, step=9)
    rig.post_action(job_id, "resume")
    third = rig.next_attempt(job_id, 3, start_step=2)
    third.metric(3, loss=9.0)
    rig.ship(third)

    assert curve(rig, job_id) == [(1, 1, 2.0), (2, 1, 3.0), (3, 3, 9.0)]
    assert curve(rig, job_id, attempt=1) == [(s, 1, 1.0 + s) for s in range(1, 8)]
    assert curve(rig, job_id, attempt=2) == [(s, 2, 2.0 + s) for s in range(6, 10)]
    assert curve(rig, job_id, attempt=4) == []


def test_an_attempt_that_goes_back_by_itself(any_rig: ServiceHarness) -> None:
    job_id, attempt = any_rig.running()
    for step, loss in ((1, 1.0), (2, 2.0), (3, 99.0), (2, 2.5), (3, 3.5)):
        attempt.metric(step, loss=loss)
    any_rig.ship(attempt)
    assert curve(any_rig, job_id) == [(1, 1, 1.0), (2, 1, 2.5), (3, 1, 3.5)]
    assert len(curve(any_rig, job_id, attempt=1)) == 5


def test_lines_of_an_old_attempt_that_come_late_do_not_cross_the_new_one(any_rig: ServiceHarness) -> None:
    rig = any_rig
    job_id, first = rig.running()
    rig.exit(first, "crashed", Reason.HUNG, step=3)
    for step in (1, 2, 3):
        first.metric(step)
    rig.post_action(job_id, "resume")
    rig.next_attempt(job_id, 2, start_step=2)
    rig.ship(first)
    assert [s for s, _, _ in curve(rig, job_id)] == [1, 2]


def test_pages_and_fields(any_rig: ServiceHarness) -> None:
    job_id, attempt = any_rig.running(steps=100)
    for step in range(1, 26):
        attempt.metric(step, loss=float(step), grad_norm=0.5)
    any_rig.ship(attempt)
    seen: list[int] = []
    page: dict[str, Any] = {"has_more": True}
    while page["has_more"]:
        page = any_rig.get(f"/jobs/{job_id}/metrics", after_step=seen[-1] if seen else 0, limit=10)
        seen += [m["step"] for m in page["data"]]
    assert seen == list(range(1, 26))
    for lineage in (False, True):
        part = any_rig.get(f"/jobs/{job_id}/metrics", after_step=3, until_step=7, limit=4, lineage=lineage)
        assert [m["step"] for m in part["data"]] == [4, 5, 6, 7]
        assert part["has_more"] is False
    row = any_rig.data(job_id, "metrics", fields="loss, grad_norm", limit=1)[0]
    assert row == {"step": 1, "attempt": 1, "loss": 1.0, "grad_norm": 0.5}
    assert any_rig.client.get(f"/jobs/{job_id}/metrics", params={"fields": "loss,secret"}).status_code == 422
    whole = any_rig.data(job_id, "metrics", limit=1)[0]
    assert set(whole) == {
        "step", "attempt", "epoch", "loss", "aux_loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second",
        "mfu", "step_seconds", "step_seconds_max_rank", "step_seconds_spread", "data_seconds", "memory_bytes",
        "eval_loss", "expert_load", "nonfinite", "at", "bpb", "eval_bpb", "eval", "train_seconds",
    }  # fmt: skip
    assert whole["at"].endswith("Z")


def test_the_experts_load_comes_back(any_rig: ServiceHarness) -> None:
    job_id, attempt = any_rig.running()
    attempt.metric(1)
    attempt.metric(2, expert_load=[0.5, 0.25, 0.25, 0.0])
    any_rig.ship(attempt)
    assert [m["expert_load"] for m in any_rig.data(job_id, "metrics")] == [None, [0.5, 0.25, 0.25, 0.0]]


def test_numbers_come_back_exactly(any_rig: ServiceHarness) -> None:
    dice = random.Random(3)
    rates = [dice.random() * 10 ** dice.randrange(-12, 3) for _ in range(50)]
    job_id, attempt = any_rig.running(steps=100)
    for step, rate in enumerate(rates, start=1):
        attempt.metric(step, learning_rate=rate, tokens=2**53 - step)
    any_rig.ship(attempt)
    found = any_rig.data(job_id, "metrics")
    assert [m["learning_rate"] for m in found] == rates
    assert [m["tokens"] for m in found] == [2**53 - s for s in range(1, 51)]


def test_other_formats_have_the_same_rows(rig: ServiceHarness) -> None:
    job_id, attempt = rig.running()
    attempt.metric(1, loss=2.5)
    attempt.metric(2, loss=None, nonfinite=True)
    rig.ship(attempt)
    rows = rig.data(job_id, "metrics")
    lines = rig.client.get(f"/jobs/{job_id}/metrics", headers={"Accept": "application/x-ndjson"})
    assert lines.headers["content-type"].startswith("application/x-ndjson")
    assert [json.loads(line) for line in lines.text.splitlines()] == rows
    text = rig.client.get(f"/jobs/{job_id}/metrics", headers={"Accept": "text/csv"})
    found = list(csv.DictReader(io.StringIO(text.text)))
    assert [(row["step"], row["loss"]) for row in found] == [("1", "2.5"), ("2", "")]
    assert "link" not in text.headers


@pytest.mark.parametrize("form", ["text/csv", "application/x-ndjson"])
def test_rows_without_a_list_around_them_say_where_the_next_page_is(any_rig: ServiceHarness, form: str) -> None:
    job_id, attempt = any_rig.running(steps=100)
    for step in range(1, 6):
        attempt.metric(step)
    any_rig.ship(attempt)
    address: str | None = f"/jobs/{job_id}/metrics?limit=2&fields=step,loss"
    seen: list[str] = []
    while address is not None:
        page = any_rig.client.get(address, headers={"Accept": form})
        seen += [line for line in page.text.splitlines() if not line.startswith("step,")]
        address = page.links["next"]["url"] if "link" in page.headers else None
    assert len(seen) == 5


def test_a_table_without_rows_has_its_columns(any_rig: ServiceHarness) -> None:
    job_id, _ = any_rig.running()
    for asked, begins in (({"fields": "loss"}, "step,attempt,loss\r\n"), ({"max_points": 9}, "first_step,step,")):
        text = any_rig.client.get(f"/jobs/{job_id}/metrics", params=asked, headers={"Accept": "text/csv"}).text
        assert text.startswith(begins)
        assert text.count("\n") == 1


@pytest.mark.parametrize("half_life", [50, 33])
def test_beside_what_was_not_finite_stands_that_it_was_not(any_rig: ServiceHarness, half_life: int) -> None:
    """Whatever the fields, the form, and whether the rows are made of points or of sums."""
    job_id, attempt = any_rig.running(steps=100)
    attempt.metric(1, loss=2.5)
    attempt.metric(2, loss=None, nonfinite=True)
    attempt.metric(3, loss=2.5, grad_norm=None, nonfinite=True)
    any_rig.ship(attempt)
    told = {"step": 2, "attempt": 1, "loss": None, "nonfinite": True}
    rows = any_rig.data(job_id, "metrics", fields="loss")
    assert rows[:2] == [{"step": 1, "attempt": 1, "loss": 2.5}, told]
    text = any_rig.client.get(f"/jobs/{job_id}/metrics?fields=loss", headers={"Accept": "text/csv"}).text
    assert text.splitlines() == ["step,attempt,loss,nonfinite", "1,1,2.5,", "2,1,,True", "3,1,2.5,True"]
    wide = {"max_points": 100, "ema_half_life": half_life}
    assert [b["nonfinite"] for b in any_rig.data(job_id, "metrics", **wide)] == [False, True, False]
    named = any_rig.data(job_id, "metrics", fields="grad_norm", **wide)
    assert [b["nonfinite"] for b in named] == [False, True, True]


def test_buckets_over_the_api(any_rig: ServiceHarness) -> None:
    job_id, attempt = any_rig.running(steps=100)
    for step in range(1, 21):
        attempt.metric(step, loss=50.0 if step == 11 else float(step))
    any_rig.ship(attempt)
    page = any_rig.get(f"/jobs/{job_id}/metrics", max_points=6)
    assert page["resolution"] == 4
    assert [(b["first_step"], b["step"], b["count"]) for b in page["data"]] == [
        (1, 3, 3), (4, 7, 4), (8, 11, 4), (12, 15, 4), (16, 19, 4), (20, 20, 1),
    ]  # fmt: skip
    third = page["data"][2]
    assert (third["loss"], third["loss_min"], third["loss_max"]) == (50.0, 8.0, 50.0)
    assert third["loss_mean"] == pytest.approx((8 + 9 + 10 + 50) / 4)


def points(*losses: float | None) -> list[Aggregate]:
    return [aggregate_of(step, loss, 1) for step, loss in enumerate(losses, start=1)]


@pytest.mark.parametrize(
    ("last", "most", "wide"), [(0, 1, 1), (1, 1, 2), (7, 8, 1), (8, 8, 2), (1_000_000, 1000, 1024)]
)
def test_width(last: int, most: int, wide: int) -> None:
    assert bucket_width(last, most) == wide
    assert last // wide + 1 <= most


def test_a_growing_curve_never_moves() -> None:
    dice = random.Random(11)
    losses = [dice.random() for _ in range(200)]
    before, after = list(to_buckets(points(*losses[:150]), 16, 50)), list(to_buckets(points(*losses), 16, 50))
    assert after[: len(before) - 1] == before[:-1]


def test_the_mean_is_the_formula_and_no_spike_is_lost() -> None:
    losses = [3.0, 2.0, None, 9.0, math.inf, 1.0]
    [row] = to_buckets(points(*losses), 8, 50)
    half = 0.5 ** (1 / 50)
    total = weight = 0.0
    before = 1
    for step, loss in enumerate(losses, start=1):
        if loss is not None and math.isfinite(loss):
            decay = half ** (step - before)
            total, weight, before = decay * total + loss, decay * weight + 1, step
    assert row["loss_ema"] == pytest.approx(total / weight)
    assert (row["loss_max"], row["loss_min"], row["nonfinite_count"]) == (9.0, 1.0, 2)
    assert list(to_buckets([], 8, 50)) == []


def test_with_no_half_life_the_mean_is_the_point_itself() -> None:
    assert [row["loss_ema"] for row in to_buckets(points(3.0, 1.0, 2.0), 1, 0)] == [3.0, 1.0, 2.0]


def test_no_evaluation_is_lost_between_the_last_points_of_buckets(any_rig: ServiceHarness) -> None:
    job_id, attempt = any_rig.running(steps=300, reporting={"eval_interval": 50})
    for step in range(1, 301):
        attempt.metric(step, eval_loss=3 + step / 100 if step % 50 == 0 else None)
    any_rig.ship(attempt)
    rows = any_rig.data(job_id, "metrics", max_points=20, fields="eval_loss")
    assert len(rows) < 21
    found = {row["eval_loss"]: row for row in rows if row["eval_loss"] is not None}
    assert list(found) == [3 + step / 100 for step in range(50, 301, 50)]
    for step, row in zip(range(50, 301, 50), found.values(), strict=True):
        assert row["first_step"] <= step <= row["step"]


def test_no_evaluation_is_lost_if_the_interval_changed(any_rig: ServiceHarness) -> None:
    """Without `eval_interval`, a run is evaluated at each save."""
    job_id, attempt = any_rig.running(steps=300, training={"max_steps": 300}, checkpoint={"save_interval": 30})
    expected = [30, 60, 90, 120, 250, 300, 500]
    for step in range(1, 301):
        attempt.metric(step, eval_loss=3 + step / 100 if step in expected else None)
    any_rig.ship(attempt)
    assert any_rig.client.patch(f"/jobs/{job_id}", json={"save_interval": 250}).status_code == 200

    def evaluated() -> list[float]:
        rows = any_rig.data(job_id, "metrics", max_points=40, fields="eval_loss,eval")
        assert all(row["first_step"] < row["step"] for row in rows[:-1])
        return [row["eval_loss"] for row in rows if row["eval_loss"] is not None]

    assert evaluated() == [3 + step / 100 for step in expected[:-1]]
    any_rig.exit(attempt, "completed", step=300)
    any_rig.post_action(job_id, "resume", {"max_steps": 600})
    later = any_rig.next_attempt(job_id, 2, start_step=300, steps=600)
    for step in range(301, 571):
        later.metric(step, eval_loss=3 + step / 100 if step in expected else None)
    any_rig.ship(later)
    assert evaluated() == [3 + step / 100 for step in expected]


def test_the_evaluation_at_the_end_of_an_attempt_is_in_its_bucket(any_rig: ServiceHarness) -> None:
    groups: dict[str, Any] = {"training": {"max_steps": 100}, "reporting": {"eval_interval": 30}}
    job_id, attempt = any_rig.running(steps=100, **groups)
    for step in range(1, 101):
        attempt.metric(step, eval_loss=float(step) if step in (30, 60, 90, 100) else None)
    any_rig.exit(attempt, "completed", step=100)
    any_rig.post_action(job_id, "resume", {"max_steps": 600})
    later = any_rig.next_attempt(job_id, 2, start_step=100, steps=600)
    for step in range(101, 601):
        later.metric(step)
    any_rig.ship(later)
    rows = any_rig.data(job_id, "metrics", max_points=100, fields="eval_loss")
    assert [row["eval_loss"] for row in rows if row["eval_loss"] is not None] == [30.0, 60.0, 90.0, 100.0]


def held_out(step: int) -> dict[str, Any]:
    """The fields of an evaluation of two sets; the bytes of one are unknown."""
    sets = {"zh": {"loss": 5.0 - step / 100, "bpb": 1.5 - step / 1000}, "code.1": {"loss": 2.0, "bpb": None}}
    return {"bpb": 1.25, "eval_loss": 3.0 - step / 100, "eval_bpb": 1.0 - step / 1000, "eval": sets}


def test_held_out_sets_come_back_with_the_points_the_buckets_and_the_job(any_rig: ServiceHarness) -> None:
    facts = [
        {"name": "zh", "files": 2, "documents": 7, "tokens": 500, "duplicates": None},
        {"name": "code.1", "files": 1, "documents": None, "tokens": 300, "duplicates": 3},
    ]
    job_id, attempt = any_rig.running(steps=100, reporting={"eval_interval": 20})
    attempt.started(steps=100, eval_sets=facts)
    for step in range(1, 71):
        attempt.metric(step, **(held_out(step) if step % 20 == 0 else {"bpb": 1.25}))
    any_rig.ship(attempt)
    names = ("bpb", "eval_loss", "eval_bpb", "eval")
    points = {row["step"]: {name: row[name] for name in names} for row in any_rig.data(job_id, "metrics")}
    none = {"bpb": 1.25, "eval_loss": None, "eval_bpb": None, "eval": None}
    assert points == {step: held_out(step) if step % 20 == 0 else none for step in range(1, 71)}
    for lineage in (False, True):
        rows = any_rig.data(job_id, "metrics", max_points=5, fields="eval,eval_bpb", lineage=lineage)
        expected = [(held_out(step)["eval"], held_out(step)["eval_bpb"]) for step in (20, 40, 60)]
        assert [(row["eval"], row["eval_bpb"]) for row in rows if row["eval"]] == expected
    (newest,) = any_rig.data(job_id, "metrics", max_points=1, fields="eval")
    assert newest["eval"] == held_out(60)["eval"]
    job = any_rig.job(job_id)
    assert job["plan"]["eval_sets"] == facts
    progress = {name: job["progress"][name] for name in ("bpb", "eval_loss", "eval_bpb", "eval_step")}
    assert progress == {"bpb": 1.25, "eval_loss": 2.4, "eval_bpb": 0.94, "eval_step": 60}


def test_a_table_has_two_columns_for_each_held_out_set(rig: ServiceHarness) -> None:
    job_id, attempt = rig.running()
    attempt.started(steps=10, eval_sets=[{"name": "zh", "files": 1, "documents": 1, "tokens": 9}])
    rig.ship(attempt)
    asked: dict[str, Any] = {"params": {"fields": "loss,eval,bpb"}, "headers": {"Accept": "text/csv"}}
    empty = rig.client.get(f"/jobs/{job_id}/metrics", **asked).text
    assert empty == "step,attempt,loss,eval.zh.loss,eval.zh.bpb,bpb\r\n"
    attempt.metric(1, loss=2.0)
    attempt.metric(2, loss=2.0, **held_out(2))
    rig.ship(attempt)
    rows = list(csv.DictReader(io.StringIO(rig.client.get(f"/jobs/{job_id}/metrics", **asked).text)))
    columns = ["eval.zh.loss", "eval.zh.bpb", "eval.code.1.loss", "eval.code.1.bpb"]
    assert [*rows[0]] == ["step", "attempt", "loss", *columns, "bpb"]
    assert [rows[0][name] for name in columns] == ["", "", "", ""]
    assert [rows[1][name] for name in columns] == ["4.98", "1.498", "2.0", ""]


def test_an_agent_of_an_older_release_sends_no_held_out_sets(any_rig: ServiceHarness) -> None:
    job_id, attempt = any_rig.running()
    attempt.metric(1, loss=2.0, eval_loss=2.5)
    any_rig.ship(attempt)
    (row,) = any_rig.data(job_id, "metrics")
    assert (row["eval_loss"], row["bpb"], row["eval_bpb"], row["eval"]) == (2.5, None, None, None)
    assert any_rig.job(job_id)["plan"]["eval_sets"] == []


@pytest.mark.parametrize("attempt", [1, 2])
@pytest.mark.parametrize("half_life", [0, 10])
def test_buckets_of_one_attempt_with_fields_and_without_a_mean(
    any_rig: ServiceHarness, attempt: int, half_life: float
) -> None:
    """All of them at once: rows are of that attempt alone, have the fields, and a half-life of 0 is the loss itself."""
    rig = any_rig
    job_id, first = rig.running(steps=200)
    for step in range(1, 101):
        first.metric(step, loss=None if step == 50 else 1.0 + step, grad_norm=step / 2)
    rig.checkpoint(job_id, first, 60)
    rig.exit(first, "failed", Reason.DIVERGED, step=100)
    rig.post_action(job_id, "resume")
    second = rig.next_attempt(job_id, 2, start_step=60, steps=200)
    for step in range(61, 201):
        second.metric(step, loss=500.0 + step, grad_norm=step / 4)
    rig.ship(second)
    wanted: dict[str, Any] = {
        "max_points": 10,
        "attempt": attempt,
        "fields": "grad_norm,tokens",
        "ema_half_life": half_life,
    }
    answer = rig.get(f"/jobs/{job_id}/metrics", **wanted)
    rows, wide = answer["data"], answer["resolution"]
    assert 1 < len(rows) <= 10
    begin, end = {1: (1, 100), 2: (61, 200)}[attempt]
    assert sum(row["count"] for row in rows) == end - begin + 1
    assert {row["attempt"] for row in rows} == {attempt}
    for row in rows:
        last = min(end, (row["step"] // wide + 1) * wide - 1)
        assert (row["step"], row["grad_norm"], row["tokens"]) == (last, last / (2 * attempt), last * 100)
        assert (half_life == 0) == (row["loss_ema"] == row["loss"])
    assert sum(row["nonfinite_count"] for row in rows) == (attempt == 1)
    part = rig.get(f"/jobs/{job_id}/metrics", **wanted, after_step=70, until_step=90)["data"]
    assert part[0]["step"] >= 70
    assert part[-1]["step"] <= 90
