"""The check that a token of scope `submit` acts on its own jobs only."""

from fastapi import Depends

from trainyard.contract.scopes import Scope
from trainyard.service.api.dependencies import StateDep
from trainyard.service.auth.principal import PrincipalDep
from trainyard.service.errors import Forbidden
from trainyard.service.jobs import queries


def require_own_job(state: StateDep, caller: PrincipalDep, job_id: str) -> None:
    """Raise Forbidden if the job has another owner and the caller's scope is not `operate`, or JobNotFound."""
    if caller.scope.covers(Scope.OPERATE):
        return
    with state.database.connection() as connection:
        owner = queries.owner_of(connection, job_id)
    if owner != caller.name:
        raise Forbidden(
            f"The job belongs to {owner}. The token {caller.name} has the scope {caller.scope}, which changes only its"
            f" own jobs. Use a token with the scope {Scope.OPERATE}, or fork the job: a fork is {caller.name}'s."
        )


OWN_JOB = Depends(require_own_job)
"""For routes with ``{job_id}`` that change the job. They also declare `SUBMIT`."""
