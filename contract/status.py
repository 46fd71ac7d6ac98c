"""The states of a job, its desired states, and the table of allowed transitions."""

from enum import StrEnum


class JobStatus(StrEnum):
    """The status of a job. `docs/guides/life-of-a-job.md` has a diagram."""

    QUEUED = "queued"
    PREPARING = "preparing"
    STARTING = "starting"
    RUNNING = "running"
    PAUSING = "pausing"
    PAUSED = "paused"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"
    SUCCEEDED = "succeeded"
    FAILED = "failed"


class CorpusStatus(StrEnum):
    """The status of a corpus of `GET /corpora`."""

    QUEUED = "queued"
    PREPARING = "preparing"
    READY = "ready"
    FAILED = "failed"
    STOPPED = "stopped"


class Desired(StrEnum):
    """What the user has requested of a job. The agent gets it in each response."""

    RUN = "run"
    PAUSE = "pause"
    CANCEL = "cancel"
    KILL = "kill"


class Phase(StrEnum):
    """What a live attempt does at the moment."""

    LOADING = "loading"
    PREPARING_DATA = "preparing_data"
    COMPILING = "compiling"
    TRAINING = "training"
    EVALUATING = "evaluating"
    SAVING = "saving"


class Reason(StrEnum):
    """Why a job is in its status."""

    USER = "user"
    SPEC_INVALID = "spec_invalid"
    DATA_INVALID = "data_invalid"
    CHECKPOINT_INVALID = "checkpoint_invalid"
    OUT_OF_MEMORY = "out_of_memory"
    HOST_OUT_OF_MEMORY = "host_out_of_memory"
    DISK_FULL = "disk_full"
    DIVERGED = "diverged"
    SILENT_CORRUPTION = "silent_corruption"
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
    LIMIT = "limit"
    UNKNOWN = "unknown"


UNCOUNTED_REASONS = frozenset(
    {Reason.HOST_RESTARTED, Reason.AGENT_LOST, Reason.TERMINATED, Reason.PREEMPTED, Reason.TIME_LIMIT, Reason.NODE_LOST}
)
"""Reasons with an external cause. Restarts after them do not count towards ``max_restarts``."""

RESTARTABLE = UNCOUNTED_REASONS | {Reason.WORKER_CRASHED, Reason.HUNG, Reason.LAUNCH_FAILED, Reason.UNKNOWN}
"""Reasons after which another attempt of the same spec may succeed."""

WAITING = frozenset({JobStatus.QUEUED, JobStatus.PREPARING})
"""Statuses in which a job waits for devices or for its corpus. It has no attempt with processes."""

LIVE = frozenset({JobStatus.STARTING, JobStatus.RUNNING, JobStatus.PAUSING, JobStatus.CANCELLING})
"""Statuses in which an attempt may have processes."""

TERMINAL = frozenset({JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED})
"""Statuses that are final unless the user resumes the job."""

IDLE = TERMINAL | {JobStatus.PAUSED, JobStatus.INTERRUPTED}
"""Statuses in which nothing runs or is queued. An interrupted job may still be waiting for an automatic restart."""

_S = JobStatus
TRANSITIONS: dict[JobStatus, frozenset[JobStatus]] = {
    _S.QUEUED: frozenset({_S.PREPARING, _S.STARTING, _S.PAUSED, _S.CANCELLED, _S.FAILED}),
    _S.PREPARING: frozenset({_S.QUEUED, _S.PAUSED, _S.CANCELLED, _S.FAILED}),
    _S.STARTING: frozenset({_S.QUEUED, _S.RUNNING, _S.PAUSING, _S.CANCELLING, _S.INTERRUPTED, _S.FAILED}),
    _S.RUNNING: frozenset({_S.PAUSING, _S.CANCELLING, _S.PAUSED, _S.INTERRUPTED, _S.SUCCEEDED, _S.FAILED}),
    _S.PAUSING: frozenset({_S.PAUSED, _S.CANCELLING, _S.INTERRUPTED, _S.SUCCEEDED, _S.FAILED}),
    _S.CANCELLING: frozenset({_S.CANCELLED, _S.SUCCEEDED}),
    _S.PAUSED: frozenset({_S.QUEUED, _S.CANCELLED}),
    _S.INTERRUPTED: frozenset({_S.QUEUED, _S.CANCELLED, _S.FAILED}),
    _S.CANCELLED: frozenset({_S.QUEUED}),
    _S.FAILED: frozenset({_S.QUEUED}),
    _S.SUCCEEDED: frozenset({_S.QUEUED}),
}
"""All allowed changes of status. Any other change is a bug and raises."""


def can_transition(before: JobStatus, after: JobStatus) -> bool:
    """Return whether `TRANSITIONS` allows ``before`` -> ``after``."""
    return after in TRANSITIONS[before]
