"""`trainyard submit`: submit a job from a spec file, MiniMind's flags, or both."""

import shlex
from types import SimpleNamespace

from trainyard.client.api import Client, Job
from trainyard.client.cli.commands.plan import plan_preview, plan_warnings
from trainyard.client.cli.console import Console
from trainyard.client.cli.parser import SUBMIT
from trainyard.client.cli.submission import Submission
from trainyard.client.errors import InvalidSpec
from trainyard.client.exit_codes import Exit, UsageError
from trainyard.contract.parsing import parse_spec


def submit(args: SimpleNamespace, console: Console) -> int:
    submission = Submission.read(SUBMIT, args, console)
    if args.timeout is not None and not args.watch:
        raise UsageError("--timeout needs --watch: it limits how long to follow")
    with Client(args.url, args.token) as trainyard:
        try:
            if args.yes:
                _warn_of_bytes(submission, console)
            elif not _confirmed(submission, trainyard, console):
                return Exit.REJECTED
            job = trainyard.submit(submission.spec, idempotency_key=args.idempotency_key)
        except InvalidSpec as error:
            submission.print_rejection(error, console)
            return Exit.REJECTED
        return _report(job, args, console)


def _warn_of_bytes(submission: Submission, console: Console) -> None:
    # The plan warns of it, and -y skips the plan. A run whose weights no other program loads must not be a surprise.
    data = submission.spec.get("data")
    if isinstance(data, dict) and "tokenizer_path" not in data:
        console.error('warning: no --tokenizer_path: the built-in "byte" tokenizer is used, which MiniMind cannot load')


def _confirmed(submission: Submission, trainyard: Client, console: Console) -> bool:
    if console.interactive and submission.args.spec != "-":
        return _ask(submission, trainyard, console)
    # No user can be asked, so warnings stop the submission.
    warnings = plan_warnings(trainyard, submission.spec)
    if warnings:
        console.error("trainyard: not submitted, because the plan has warnings:")
        for line in warnings:
            console.error(line)
        console.error("-y submits in spite of them; `trainyard plan` shows the whole plan")
    return not warnings


def _ask(submission: Submission, trainyard: Client, console: Console) -> bool:
    parsed = parse_spec(submission.spec)
    if parsed.problems:
        console.error("trainyard: the spec is invalid; nothing was submitted")
        submission.print_problems([(problem.pointer, problem.message) for problem in parsed.problems], console)
        return False
    for line in plan_preview(trainyard, submission.spec):
        console.error(line)
    return console.confirm("Submit?")


def _report(job: Job, args: SimpleNamespace, console: Console) -> int:
    if args.watch:
        # Imported here, because a submit without --watch needs none of it.
        from trainyard.client.cli.watch.watcher import follow_job

        return follow_job(job["id"], args, console, handle=job["id"])
    if args.json:
        console.json(job)
        return Exit.SUCCEEDED
    console.data(job["id"])
    console.error(f"{job['status']}: {job.get('summary') or job.get('message') or job['name']}")
    console.error(f"next:  trainyard watch {shlex.quote(job['id'])}")
    return Exit.SUCCEEDED
