"""Find the job that a command names."""

from difflib import get_close_matches
from typing import cast

from trainyard.client.api import Client, Job
from trainyard.client.cli.console import Console
from trainyard.client.errors import AmbiguousName, NotFound

NEWEST = 100
"""The jobs among which a mistyped name is looked for."""


def split_step(handle: str) -> tuple[str, str | None]:
    """Return job and step of ``JOB@STEP``; the step is digits, "latest", or None if none is given."""
    name, at, step = handle.rpartition("@")
    return (name, step) if at and (step == "latest" or step.isdecimal()) else (handle, None)


def find_job(trainyard: Client, handle: str, console: Console) -> Job:
    """Return the job with this id or name. If several have the name, return the newest, with a note on stderr.

    NotFound has a note with what was probably meant.
    """
    try:
        return trainyard.find(handle)
    except NotFound as error:
        if note := _meant(trainyard, handle):
            error.add_note(note)
        raise
    except AmbiguousName as error:
        newest, *others = error.jobs
        older = ", ".join(f"{job['id']} ({job['status']})" for job in others[:5])
        console.error(
            f"{handle} is the newest of {len(error.jobs)} jobs with this name, {newest['id']}; older: {older}"
        )
        return cast(Job, newest)


def _meant(trainyard: Client, handle: str) -> str | None:
    name, _, step = handle.rpartition("@")
    if name:
        return f"{step!r} is not a step: after @ comes a number or latest, as in {name}@1200"
    names = [job["name"] for job in trainyard.jobs(limit=NEWEST)]
    return next((f"did you mean {near}?" for near in get_close_matches(handle, names, n=1, cutoff=0.7)), None)
