"""The subcommands about scores on tasks: evaluate a checkpoint, and list the scores of a job."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from trainyard.client.api import Client
from trainyard.client.cli.commands.show import Row, connect, print_list
from trainyard.client.cli.console import Console
from trainyard.client.cli.find import find_job
from trainyard.client.cli.formatting import count, fixed, one_line, table
from trainyard.client.errors import WaitTimedOut
from trainyard.client.exit_codes import Exit, UsageError
from trainyard.contract.units import counted

KIND_OF_KEY = {"choices": "choice", "continuation": "continuation"}
MAX_LINE = 8 << 20


def evaluate(args: SimpleNamespace, console: Console) -> int:
    """Evaluate the checkpoint of ``JOB@STEP`` or ``--step``, or the newest, and print the scores."""
    tasks = [_task(text, args.kind) for text in args.task] or None
    handle, step = job_and_step(args)
    with connect(args) as trainyard:
        job_id = find_job(trainyard, handle, console)["id"]
        evaluation = trainyard.evaluate(job_id, step, tasks)
        if not args.no_wait:
            what = f"evaluating step {count(evaluation['step'])} on {counted(len(evaluation['results']), 'task')}"
            console.error(f"{what}; it continues on the service if you stop waiting")
            try:
                evaluation = trainyard.wait_evaluation(evaluation, args.timeout)
            except WaitTimedOut as error:
                console.error(f"{error}; `trainyard evaluations {handle}` lists its scores")
                return Exit.TIMED_OUT
    if args.json:
        console.json(evaluation)
    else:
        console.lines(table(HEADER, [_row(score) for score in evaluation["results"]]))
    return Exit.RUN_FAILED if evaluation["state"] == "failed" else Exit.SUCCEEDED


def job_and_step(args: SimpleNamespace) -> tuple[str, int | str]:
    """Return the job and the step that ``JOB@STEP`` and ``--step`` name, by default "latest". Raises UsageError."""
    name, at, text = args.job.rpartition("@")
    if not at or not (text == "latest" or text.isdecimal()):
        return args.job, "latest" if args.step is None else args.step
    if args.step is not None:
        raise UsageError(f"give either {args.job} or --step")
    return name, text


def _task(text: str, kind: str | None) -> dict[str, str]:
    name, equals, file = text.partition("=")
    if not equals or not name or not file:
        raise UsageError(f"--task takes NAME=FILE, as in arc=arc.jsonl, not {text!r}")
    path = Path(file).expanduser().absolute()
    return {"name": name, "path": str(path), "kind": kind or _kind_of(path)}


def _kind_of(path: Path) -> str:
    """Return the kind of a task file, by the first line that is not blank. Raises UsageError."""
    try:
        with path.open("rb") as lines:
            first = next((line for line in iter(lambda: lines.readline(MAX_LINE), b"") if line.strip()), b"")
        keys = json.loads(first.decode("utf-8-sig")).keys()
    except OSError as error:
        hint = "give --kind if only the service's host has the file"
        raise UsageError(f"{path} cannot be read: {error.strerror}; {hint}") from None
    except (ValueError, AttributeError, RecursionError):
        raise UsageError(f"{path}: the first line must be a JSON object") from None
    kind = next((kind for key, kind in KIND_OF_KEY.items() if key in keys), None)
    if kind is None:
        raise UsageError(f"{path}: the first line has neither 'choices' nor 'continuation'")
    return kind


def evaluations(args: SimpleNamespace, console: Console) -> int:
    def read(trainyard: Client, job_id: str) -> list[Any]:
        return list(trainyard.evaluations(job_id, step=args.step, task=args.task))

    return print_list(args, console, read, HEADER, _row)


HEADER = ("STEP", "TASK", "ACC", "ACC NORM", "BPB", "EXAMPLES", "MEASURED")


def _row(score: Any) -> Row:
    measured = (
        "in training" if score.get("evaluation_id") is None else f"on {score['device']}" if score["device"] else ""
    )
    if score["state"] != "done":
        measured = f"{score['state']}: {one_line(score['error'], 120)}" if score.get("error") else score["state"]
    numbers = ("" if score[name] is None else fixed(score[name], 4) for name in ("acc", "acc_norm", "bpb"))
    return (count(score["step"]), score["task"], *numbers, count(score["examples"]), measured)
