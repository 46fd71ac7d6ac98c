"""The states of a job, what the user wants of it, and the one table of allowed transitions."""

from enum import StrEnum


class JobStatus(StrEnum):
    """Where a job is in its life. `docs/guides/life-of-a-job.md` draws it."""

    QUEUED = "queued"
    STARTING = "starting"
    RUNNING = "running"
    PAUSING = "pausing"
    PAUSED = "paused"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"
    SUCCEEDED = "succeeded"
    FAILED = "failed"


class Desired(StrEnum):
    """What the user wants of a job; the agent hears it in each reply."""

    RUN = "run"
    PAUSE = "pause"
    CANCEL = "cancel"
    KILL = "kill"


class Phase(StrEnum):
    """What a live attempt is busy with."""

    LOADING = "loading"
    PREPARING_DATA = "preparing_data"
    COMPILING = "compiling"
    TRAINING = "training"
    EVALUATING = "evaluating"
    SAVING = "saving"


class Reason(StrEnum):
    """Why a job is where it is, and so who is at fault."""

    USER = "user"
    SPEC_INVALID = "spec_invalid"
    DATA_INVALID = "data_invalid"
    CHECKPOINT_INVALID = "checkpoint_invalid"
    OUT_OF_MEMORY = "out_of_memory"
    HOST_OUT_OF_MEMORY = "host_out_of_memory"
    DISK_FULL = "disk_full"
    DIVERGED = "diverged"
    WORKER_CRASHED = "worker_crashed"
    HUNG = "hung"
    HOST_RESTARTED = "host_restarted"
    AGENT_LOST = "agent_lost"
    LAUNCH_FAILED = "launch_failed"
    MAX_RESTARTS = "max_restarts"
    TERMINATED = "terminated"
    PREEMPTED = "preempted"
    TIME_LIMIT = "time_limit"
    NODE_LOST = "node_lost"
    UNKNOWN = "unknown"


RESTARTABLE = frozenset(
    {
        Reason.WORKER_CRASHED,
        Reason.HUNG,
        Reason.HOST_RESTARTED,
        Reason.AGENT_LOST,
        Reason.LAUNCH_FAILED,
        Reason.TERMINATED,
        Reason.PREEMPTED,
        Reason.TIME_LIMIT,
        Reason.NODE_LOST,
        Reason.UNKNOWN,
    }
)
"""Ends after which another attempt on the same spec may go better."""

UNCOUNTED_REASONS = frozenset(
    {
        Reason.HOST_RESTARTED,
        Reason.AGENT_LOST,
        Reason.TERMINATED,
        Reason.PREEMPTED,
        Reason.TIME_LIMIT,
        Reason.NODE_LOST,
    }
)
"""Ends that are no fault of the job's, so that they do not use up ``max_restarts``."""

LIVE = frozenset({JobStatus.STARTING, JobStatus.RUNNING, JobStatus.PAUSING, JobStatus.CANCELLING})
"""An attempt may have processes."""

TERMINAL = frozenset({JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED})
"""Final until the user resumes."""

IDLE = TERMINAL | {JobStatus.PAUSED, JobStatus.INTERRUPTED}
"""Nothing runs and nothing is waiting to run, except an interrupted job that is waiting for its own restart."""

TRANSITIONS: dict[JobStatus, frozenset[JobStatus]] = {
    JobStatus.QUEUED: frozenset({JobStatus.STARTING, JobStatus.PAUSED, JobStatus.CANCELLED, JobStatus.FAILED}),
    JobStatus.STARTING: frozenset(
        {
            JobStatus.QUEUED,
            JobStatus.RUNNING,
            JobStatus.PAUSING,
            JobStatus.CANCELLING,
            JobStatus.INTERRUPTED,
            JobStatus.FAILED,
        }
    ),
    JobStatus.RUNNING: frozenset(
        {
            JobStatus.PAUSING,
            JobStatus.CANCELLING,
            JobStatus.PAUSED,
            JobStatus.INTERRUPTED,
            JobStatus.SUCCEEDED,
            JobStatus.FAILED,
        }
    ),
    JobStatus.PAUSING: frozenset(
        {
            JobStatus.PAUSED,
            JobStatus.CANCELLING,
            JobStatus.INTERRUPTED,
            JobStatus.SUCCEEDED,
            JobStatus.FAILED,
        }
    ),
    JobStatus.CANCELLING: frozenset({JobStatus.CANCELLED, JobStatus.SUCCEEDED}),
    JobStatus.PAUSED: frozenset({JobStatus.QUEUED, JobStatus.CANCELLED}),
    JobStatus.INTERRUPTED: frozenset({JobStatus.QUEUED, JobStatus.CANCELLED, JobStatus.FAILED}),
    JobStatus.CANCELLED: frozenset({JobStatus.QUEUED}),
    JobStatus.FAILED: frozenset({JobStatus.QUEUED}),
    JobStatus.SUCCEEDED: frozenset({JobStatus.QUEUED}),
}
"""Every change of status there is. A change outside this table is a bug and raises."""


def can_transition(before: JobStatus, after: JobStatus) -> bool:
    """Whether the table allows ``before`` -> ``after``."""
    return after in TRANSITIONS[before]
