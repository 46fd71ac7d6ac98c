"""Find the job that a command names."""

from typing import cast

from trainyard.client.api import Client, Job
from trainyard.client.cli.console import Console
from trainyard.client.errors import AmbiguousName


def split_step(handle: str) -> tuple[str, str | None]:
    """Return job and step of ``JOB@STEP``; the step is digits, "latest", or None if none is given."""
    name, at, step = handle.rpartition("@")
    return (name, step) if at and (step == "latest" or step.isdecimal()) else (handle, None)


def find_job(trainyard: Client, handle: str, console: Console) -> Job:
    """Return the job with this id or name. If several have the name, return the newest, with a note on stderr."""
    try:
        return trainyard.find(handle)
    except AmbiguousName as error:
        newest, *others = error.jobs
        older = ", ".join(f"{job['id']} ({job['status']})" for job in others[:5])
        console.error(
            f"{handle} is the newest of {len(error.jobs)} jobs with this name, {newest['id']}; older: {older}"
        )
        return cast(Job, newest)
