from datetime import timedelta
from typing import Any

import pytest

from tests.client.fake_service import NOW, URL, job, metric
from trainyard.client.cli.formatting import display_width
from trainyard.client.cli.watch.checkpoints import KeptCheckpoints
from trainyard.client.cli.watch.render import MAX_LINES, plain, render
from trainyard.client.cli.watch.state import WatchState
from trainyard.contract.status import JobStatus


def scene(**changes: Any) -> WatchState:
    made = WatchState(handle="pre-12", url=URL, job=job(**changes), answered_at=NOW)
    made.curve.extend(metric(step, 8.0 - step / 2000, attempt=2) for step in range(100, 12401, 100))
    made.curve.extend([metric(12400, 2.887, attempt=2, eval_loss=None)])
    made.curve.last_eval = {"step": 12000, "eval_loss": 3.021}
    made.checkpoints = KeptCheckpoints(12000, 3, 2_300_000_000, verified=True)
    return made


def drawn(of: WatchState, width: int = 110) -> list[str]:
    return plain(render(of, NOW, width))


def test_the_display_of_a_running_job() -> None:
    eta = (NOW + timedelta(seconds=7800)).astimezone().strftime("%H:%M")
    lines = drawn(scene())
    ema = lines[2].split()[1]
    assert 2.0 < float(ema) < 3.0
    assert lines == [
        "pre-12   attempt 2   job_7f3kq9" + " " * 41 + "Ctrl-C detaches; the job keeps running",
        f"> RUNNING   step 12,400 / 40,000   31.0 %   #########---------------------   ETA 2 h 10 min ({eta})",
        f"  loss      {ema} ema   2.887 last   ██▇▇▇▆▆▆▆▅▅▅▄▄▄▃▃▃▂▂▂▁▁▁   eval 3.021 at 12,000",
        "  speed     118,240 tok/s   0.277 s/step   MFU 41 %   tokens 406 M of 1.31 B",
        "  optim     lr 2.61e-04   grad norm 0.48",
        "  ckpt      12,000 saved 3 min ago, verified; next in 2 min 46 s; 3 kept, 2.3 GB",
        "live, updated 1 s ago   http://127.0.0.1:8000/jobs/job_7f3kq9",
    ]


def test_a_narrow_terminal_shows_the_whole_address_or_none() -> None:
    url = "http://127.0.0.1:8000/jobs/job_7f3kq9"
    assert [drawn(scene(), width)[-1] for width in (61, 60, 44, 43)] == [
        f"live, updated 1 s ago   {url}",
        f"live   {url}",
        f"live   {url}",
        "live, updated 1 s ago",
    ]


def test_an_evaluation_has_its_bits_per_byte() -> None:
    evaluated = scene()
    evaluated.curve.last_eval = {"step": 12000, "eval_loss": 3.021, "eval_bpb": 1.25}
    assert drawn(evaluated)[2].endswith("   eval 3.021, 1.250 bits/byte at 12,000")


def test_there_is_a_display_before_the_first_poll() -> None:
    empty = WatchState(handle="pre-12", url=URL, connection_error="connection refused")
    assert drawn(empty)[0].startswith("pre-12")
    assert drawn(empty)[-1] == f"reconnecting, no answer yet   {URL}"


def test_a_lost_service_keeps_the_numbers_and_shows_the_time() -> None:
    lost = scene()
    lost.connection_error, lost.answered_at = "connection refused", NOW - timedelta(seconds=12)
    lines = drawn(lost)
    assert lines[-1] == "reconnecting, no answer for 12 s   http://127.0.0.1:8000/jobs/job_7f3kq9"
    assert lines[:-1] == drawn(scene())[:-1]


def test_a_queued_job_shows_what_it_waits_for() -> None:
    waiting = WatchState(
        "p", URL, job("queued", progress={"step": None}, checkpoint=None, summary="Waiting for 2 GPUs.")
    )
    assert drawn(waiting)[1:3] == ["~ QUEUED", "  Waiting for 2 GPUs."]


def test_a_phase_that_is_not_training_is_named() -> None:
    lines = drawn(scene(phase="preparing_data", summary="Preparing the data (40 %)."))
    assert lines[1].startswith("> RUNNING (preparing_data)   step")
    assert lines[2] == "  Preparing the data (40 %)."


def test_messages_and_alerts_are_there_but_never_too_many_lines() -> None:
    alerts = [{"code": "flat", "message": f"alert {number}\nsecond line"} for number in range(30)]
    lines = drawn(scene(message="restarting in 5 s, 1 of 3", alerts=alerts))
    assert "  restarting in 5 s, 1 of 3" in lines
    assert "  alert     alert 0 second line" in lines
    assert len(lines) <= MAX_LINES
    assert lines[-1].startswith("live")


@pytest.mark.parametrize("width", [1, 20, 40, 80, 200])
@pytest.mark.parametrize("letter", ["n", "预"])
def test_no_line_is_longer_than_the_screen(width: int, letter: str) -> None:
    lines = drawn(scene(name=letter * 300 + "\x1b[2J", message=letter * 500), width)
    assert max(map(display_width, lines)) <= width
    assert not any("\x1b" in line or "\n" in line for line in lines)


@pytest.mark.parametrize("status", list(JobStatus))
def test_every_status_is_a_word(status: JobStatus) -> None:
    assert status.upper() in drawn(scene(status=status))[1]


def test_unknown_numbers_are_dashes() -> None:
    bare = WatchState("p", URL, job(progress={"step": 3, "steps": None, "percent": None}, checkpoint=None, plan=None))
    text = "\n".join(drawn(bare))
    assert "step 3 / -" in text
    assert "loss      - ema   - last" in text
    assert "MFU" not in text


def test_only_a_verified_checkpoint_is_shown_as_verified() -> None:
    for kept in (
        None,
        KeptCheckpoints(12000, 1, 766_000_000, verified=False),
        KeptCheckpoints(11000, 1, 766_000_000, verified=True),
    ):
        unsure = scene()
        unsure.checkpoints = kept
        assert "verified" not in "\n".join(drawn(unsure))
        assert "766.0 MB" in "\n".join(drawn(unsure))


def test_the_next_save_may_come_by_the_clock() -> None:
    timed = scene(spec={"checkpoint": {"save_interval": 1000, "save_minutes": 4}})
    assert "; next in 1 min; 3 kept" in drawn(timed)[5]


def test_while_it_loads_the_sentence_stands_where_no_step_is() -> None:
    loading = WatchState(handle="pre-12", url=URL)
    loading.job = job(phase=None, summary="Loading.", progress={"step": 0, "steps": None, "percent": None})
    text = drawn(loading)
    assert text[1:3] == ["> RUNNING", "  Loading."]
