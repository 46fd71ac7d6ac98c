"""`trainyard submit`: a spec file, MiniMind's flags, or both."""

import shlex
from types import SimpleNamespace

from trainyard.client.api import Client
from trainyard.client.cli.commands.plan import shown_before, warned_before
from trainyard.client.cli.console import Console
from trainyard.client.cli.parser import SUBMIT
from trainyard.client.cli.submission import Submission
from trainyard.client.errors import InvalidSpec
from trainyard.client.exit_codes import Exit, UsageError
from trainyard.client.types import Job
from trainyard.contract.parsing import parse_spec


def submit(args: SimpleNamespace, console: Console) -> int:
    """Launch a run."""
    asked = Submission.read(SUBMIT, args, console)
    if args.timeout is not None and not args.watch:
        raise UsageError("--timeout says how long to follow: give --watch as well")
    with Client(args.url, args.token) as trainyard:
        try:
            if not args.yes and not _wanted(asked, trainyard, console):
                return Exit.REFUSED
            job = trainyard.submit(asked.spec)
        except InvalidSpec as error:
            asked.error_text(error, console)
            return Exit.REFUSED
        return _launched(job, args, console)


def _wanted(asked: Submission, trainyard: Client, console: Console) -> bool:
    """A person is shown the plan and asked; nobody is there to ask where the plan has warnings."""
    if console.interactive and asked.args.spec != "-":
        return _agreed(asked, trainyard, console)
    warned = warned_before(trainyard, asked.spec)
    if warned:
        console.error("trainyard: not submitted, because the plan has warnings:")
        for line in warned:
            console.error(line)
        console.error("-y submits in spite of them; `trainyard plan` shows the whole plan")
    return not warned


def _agreed(asked: Submission, trainyard: Client, console: Console) -> bool:
    """Show what would be submitted and ask. A spec that is wrong is not worth a question."""
    parsed = parse_spec(asked.spec)
    if parsed.problems:
        console.error("trainyard: the spec is wrong; nothing was sent")
        asked.list_problems([(problem.pointer, problem.message) for problem in parsed.problems], console)
        return False
    for line in shown_before(trainyard, asked.spec):
        console.error(line)
    return console.confirm("Submit?")


def _launched(job: Job, args: SimpleNamespace, console: Console) -> int:
    if args.watch:
        # Imported here: a submit that does not watch draws nothing.
        from trainyard.client.cli.watch.watcher import follow_job

        return follow_job(job["id"], args, console, handle=job["id"])
    if args.json:
        console.json(job)
        return Exit.SUCCEEDED
    console.data(job["id"])
    console.error(f"{job['status']}: {job.get('summary') or job.get('message') or job['name']}")
    console.error(f"next:  trainyard watch {shlex.quote(job['id'])}")
    return Exit.SUCCEEDED
