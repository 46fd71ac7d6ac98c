import pytest

from trainyard.worker.training.nonfinite import (
    ROLLBACKS,
    SKIPS_IN_A_ROW,
    SKIPS_IN_ALL,
    Policy,
    Trouble,
    Verdict,
    describe,
    judge,
)


def test_a_finite_step_is_applied_and_ends_a_row_of_skips() -> None:
    assert judge(True, "skip", Trouble(in_a_row=3, skipped=7), None) == (Verdict.APPLIED, Trouble(0, 7, 0))


def test_fail_fails_at_once() -> None:
    assert judge(False, "fail", Trouble(), None)[0] is Verdict.FAIL


def test_skip_gives_up_after_so_many_in_a_row() -> None:
    trouble, verdicts = Trouble(), []
    for _ in range(SKIPS_IN_A_ROW + 1):
        verdict, trouble = judge(False, "skip", trouble, None)
        verdicts.append(verdict)
    assert verdicts == [Verdict.SKIP] * SKIPS_IN_A_ROW + [Verdict.FAIL]


def test_skip_gives_up_after_so_many_in_all() -> None:
    trouble, skipped = Trouble(), 0
    while True:
        verdict, trouble = judge(False, "skip", trouble, None)
        if verdict is Verdict.FAIL:
            break
        skipped += 1
        _, trouble = judge(True, "skip", trouble, None)
    assert skipped == SKIPS_IN_ALL


def test_rollback_gives_up_after_three() -> None:
    trouble, verdicts = Trouble(), []
    for _ in range(ROLLBACKS + 1):
        verdict, trouble = judge(False, "rollback", trouble, None)
        verdicts.append(verdict)
    assert verdicts == [Verdict.ROLL_BACK] * 3 + [Verdict.FAIL]


@pytest.mark.parametrize("policy", ["fail", "skip", "rollback"])
def test_an_fp16_overflow_is_ordinary_until_the_scale_is_down(policy: Policy) -> None:
    assert judge(False, policy, Trouble(), 65536.0) == (Verdict.OVERFLOWED, Trouble())
    assert judge(False, policy, Trouble(), 1.0)[0] is not Verdict.OVERFLOWED


@pytest.mark.parametrize("policy", ["fail", "skip", "rollback"])
def test_a_loss_that_is_no_number_is_no_fp16_overflow(policy: Policy) -> None:
    found = judge(False, policy, Trouble(), 65536.0, losses_finite=False)
    assert found == judge(False, policy, Trouble(), None)
    assert found[0] is not Verdict.OVERFLOWED


def test_the_description_names_step_and_rows() -> None:
    assert describe(7, (3, 4, 5), (4,)) == "the loss is not finite at step 7, in row 4"
    text = describe(9, tuple(range(12)), ())
    assert text == (
        "the gradient is not finite at step 9, over rows 0, 1, 2, 3, 4, 5, 6, 7 and 4 more; every loss was finite"
    )
