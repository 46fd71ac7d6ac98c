"""The failure card: what, evidence and hint as the attempt's report had them, and what to do now. Pure.

The same object in the API, in the terminal and in a webhook.
"""

from contract.report import Failure
from contract.status import JobStatus
from service.jobs import store
from service.jobs.remedies import Trouble, remedies
from service.jobs.rules import resume_blocker
from service.tables import JobRow


def failure(job: JobRow, step: int | None) -> Failure | None:
    """The card of a job that failed or was interrupted; None where nothing went wrong.

    ``step``: of its newest checkpoint.
    """
    if not job.error:
        return None
    card = Failure.model_validate(job.error)
    if JobStatus(job.status) not in (JobStatus.FAILED, JobStatus.INTERRUPTED):
        return card
    trouble = Trouble(
        job_id=job.id,
        attempt=job.attempt,
        code=card.code,
        rank=card.rank,
        spec=job.spec,
        step=step,
        inherited=job.parent_step is not None,
        resumable=resume_blocker(store.standing(job)) is None,
        restarts_itself=job.restart_at is not None,
    )
    return card.model_copy(update={"next": remedies(trouble)})
