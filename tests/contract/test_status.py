"""The table of transitions is complete and has no dead ends that it should not have."""

from trainyard.contract.status import (
    IDLE,
    LIVE,
    RESTARTABLE,
    TERMINAL,
    TRANSITIONS,
    UNCOUNTED_REASONS,
    WAITING,
    JobStatus,
    can_transition,
)


def test_every_status_has_a_row_and_every_target_is_reachable() -> None:
    assert set(TRANSITIONS) == set(JobStatus)
    reached = set().union(*TRANSITIONS.values())
    assert reached == set(JobStatus)


def test_a_terminal_state_is_left_only_by_a_resume() -> None:
    for status in TERMINAL:
        assert TRANSITIONS[status] == {JobStatus.QUEUED}


def test_nothing_runs_without_having_started() -> None:
    assert [status for status in JobStatus if can_transition(status, JobStatus.RUNNING)] == [JobStatus.STARTING]
    assert [status for status in JobStatus if can_transition(status, JobStatus.STARTING)] == [JobStatus.QUEUED]


def test_live_and_idle_are_disjoint() -> None:
    assert not LIVE & IDLE
    assert set(JobStatus) == LIVE | IDLE | WAITING


def test_cancelling_leads_only_to_final_statuses() -> None:
    assert TRANSITIONS[JobStatus.CANCELLING] <= TERMINAL


def test_what_is_not_counted_can_be_restarted() -> None:
    assert UNCOUNTED_REASONS <= RESTARTABLE
