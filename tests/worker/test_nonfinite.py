import pytest

from trainyard.worker.training.nonfinite import (
    MAX_CONSECUTIVE_SKIPS,
    MAX_ROLLBACKS,
    MAX_SKIPS,
    NonFiniteCounters,
    Policy,
    StepDecision,
    decide_step,
    nonfinite_message,
)


def test_a_finite_step_is_applied_and_resets_the_skips_in_a_row() -> None:
    assert decide_step(True, "skip", NonFiniteCounters(in_a_row=3, skipped=7), None) == (
        StepDecision.APPLIED,
        NonFiniteCounters(0, 7, 0),
    )


def test_fail_fails_at_once() -> None:
    assert decide_step(False, "fail", NonFiniteCounters(), None)[0] is StepDecision.FAIL


def test_skip_fails_after_too_many_in_a_row() -> None:
    counters, decisions = NonFiniteCounters(), []
    for _ in range(MAX_CONSECUTIVE_SKIPS + 1):
        decision, counters = decide_step(False, "skip", counters, None)
        decisions.append(decision)
    assert decisions == [StepDecision.SKIP] * MAX_CONSECUTIVE_SKIPS + [StepDecision.FAIL]


def test_skip_fails_after_too_many_in_total() -> None:
    counters, skipped = NonFiniteCounters(), 0
    while True:
        decision, counters = decide_step(False, "skip", counters, None)
        if decision is StepDecision.FAIL:
            break
        skipped += 1
        _, counters = decide_step(True, "skip", counters, None)
    assert skipped == MAX_SKIPS


def test_rollback_gives_up_after_three() -> None:
    counters, decisions = NonFiniteCounters(), []
    for _ in range(MAX_ROLLBACKS + 1):
        decision, counters = decide_step(False, "rollback", counters, None)
        decisions.append(decision)
    assert decisions == [StepDecision.ROLL_BACK] * 3 + [StepDecision.FAIL]


@pytest.mark.parametrize("policy", ["fail", "skip", "rollback"])
def test_an_fp16_overflow_is_harmless_until_the_scale_is_at_its_minimum(policy: Policy) -> None:
    assert decide_step(False, policy, NonFiniteCounters(), 65536.0) == (StepDecision.OVERFLOWED, NonFiniteCounters())
    assert decide_step(False, policy, NonFiniteCounters(), 1.0)[0] is not StepDecision.OVERFLOWED


@pytest.mark.parametrize("policy", ["fail", "skip", "rollback"])
def test_a_nonfinite_loss_is_no_fp16_overflow(policy: Policy) -> None:
    found = decide_step(False, policy, NonFiniteCounters(), 65536.0, losses_finite=False)
    assert found == decide_step(False, policy, NonFiniteCounters(), None)
    assert found[0] is not StepDecision.OVERFLOWED


def test_the_message_names_step_and_rows() -> None:
    assert nonfinite_message(7, (3, 4, 5), (4,)) == "the loss is not finite at step 7, in row 4"
    text = nonfinite_message(9, tuple(range(12)), ())
    assert text == (
        "the gradient is not finite at step 9, over rows 0, 1, 2, 3, 4, 5, 6, 7 and 4 more; every loss was finite"
    )
