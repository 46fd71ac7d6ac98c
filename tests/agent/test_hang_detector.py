"""A hang is a lack of progress, measured against the run's own pace, and never the clock's or the agent's fault."""

from pathlib import Path

import pytest

from trainyard.contract.events import PhaseChanged
from trainyard.contract.outbox import OutboxReader
from trainyard.contract.rundir import AttemptDir
from trainyard.contract.spec import Timeouts
from trainyard.contract.status import Phase
from trainyard.worker.agent.hang_detector import UNKNOWN_STEP_TIME_SECONDS, HangDetector


@pytest.fixture
def attempt(tmp_path: Path) -> AttemptDir:
    return AttemptDir(tmp_path)


@pytest.fixture
def watch(attempt: AttemptDir) -> HangDetector:
    return HangDetector(attempt, OutboxReader(attempt.outbox), Timeouts(progress=60.0, preparing=500.0))


def enter(attempt: AttemptDir, phase: Phase) -> None:
    with attempt.outbox.open("a") as outbox:
        outbox.write(PhaseChanged(phase=phase).model_dump_json() + "\n")


def look_until(watch: HangDetector, start: float, end: float) -> float:
    while start < end:
        watch.poll(start)
        start += 1.0
    return start


def walk(watch: HangDetector, attempt: AttemptDir, pace: int, steps: int) -> float:
    now = 0.0
    for step in range(1, steps + 1):
        now = look_until(watch, now, step * pace)
        attempt.progress.write_text(str(step))
    watch.poll(now)
    return now


def test_a_quick_run_gets_the_minimum(watch: HangDetector, attempt: AttemptDir) -> None:
    enter(attempt, Phase.TRAINING)
    last = walk(watch, attempt, pace=1, steps=5)
    look_until(watch, last, last + 60)
    assert not watch.is_hung(last + 60)
    assert watch.is_hung(last + 61)


def test_a_slow_run_gets_ten_of_its_own_steps(watch: HangDetector, attempt: AttemptDir) -> None:
    enter(attempt, Phase.TRAINING)
    last = walk(watch, attempt, pace=40, steps=5)
    assert watch.budget() == pytest.approx(400, rel=0.05)
    look_until(watch, last, last + 300)
    assert not watch.is_hung(last + 300)
    look_until(watch, last + 300, last + 420)
    assert watch.is_hung(last + 420)


def test_reports_of_micro_batches_do_not_shorten_the_budget(watch: HangDetector, attempt: AttemptDir) -> None:
    """Only the first steps report their micro-batches. The later steps are as slow, and report nothing."""
    enter(attempt, Phase.TRAINING)
    attempt.progress.write_text("0")
    watch.poll(0.0)
    for step in range(3):
        for part in range(9):
            look_until(watch, step * 90 + part * 10, step * 90 + (part + 1) * 10)
            enter(attempt, Phase.TRAINING)
        attempt.progress.write_text(str(step + 1))
    look_until(watch, 270.0, 359.0)
    assert watch.budget() == pytest.approx(900, rel=0.05)
    assert not watch.is_hung(359.0)


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase is not Phase.TRAINING])
def test_preparing_compiling_and_saving_have_a_longer_budget(
    watch: HangDetector, attempt: AttemptDir, phase: Phase
) -> None:
    enter(attempt, Phase.TRAINING)
    last = walk(watch, attempt, pace=1, steps=5)
    enter(attempt, phase)
    look_until(watch, last, last + 400)
    assert watch.phase is phase
    assert not watch.is_hung(last + 400)
    look_until(watch, last + 400, last + 502)
    assert watch.is_hung(last + 502)


def test_a_first_step_of_unknown_length_is_waited_for(watch: HangDetector, attempt: AttemptDir) -> None:
    enter(attempt, Phase.TRAINING)
    look_until(watch, 0.0, 900.0)
    assert not watch.is_hung(900.0)
    assert watch.budget() == UNKNOWN_STEP_TIME_SECONDS


def test_an_agent_that_slept_does_not_blame_the_ranks(watch: HangDetector, attempt: AttemptDir) -> None:
    enter(attempt, Phase.TRAINING)
    last = walk(watch, attempt, pace=1, steps=5)
    watch.poll(last + 5000)
    assert not watch.is_hung(last + 5000)
    look_until(watch, last + 5001, last + 5070)
    assert watch.is_hung(last + 5070)


def test_any_line_of_the_outbox_is_a_sign_of_life(watch: HangDetector, attempt: AttemptDir) -> None:
    enter(attempt, Phase.TRAINING)
    last = walk(watch, attempt, pace=1, steps=5)
    now = look_until(watch, last, last + 50)
    enter(attempt, Phase.TRAINING)
    look_until(watch, now, now + 50)
    assert not watch.is_hung(now + 50)


def test_a_torn_or_empty_step_file_is_no_step(watch: HangDetector, attempt: AttemptDir) -> None:
    for text in ("", "abc"):
        attempt.progress.write_text(text)
        watch.poll(1.0)
        assert watch.step is None
