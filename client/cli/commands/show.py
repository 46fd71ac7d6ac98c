"""The subcommands that read: list, show, metrics, events, attempts, samples, devices, version."""

import csv
import io
import shlex
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from importlib.metadata import version as installed_version
from itertools import chain
from types import SimpleNamespace
from typing import Any

from trainyard.client.api import Client
from trainyard.client.cli.console import Console
from trainyard.client.cli.find import find_job
from trainyard.client.cli.formatting import (
    UNKNOWN,
    ago,
    count,
    duration,
    fixed,
    one_line,
    scientific,
    size,
    status_word,
    table,
)
from trainyard.client.cli.watch.job_page import job_page
from trainyard.client.errors import NotFound, ServiceUnreachable
from trainyard.client.exit_codes import Exit

CELL = 60
UNITS = ("loss", "bpb")
Row = Sequence[str]


def connect(args: SimpleNamespace) -> Client:
    """Return a client for ``--url`` and ``--token``."""
    return Client(args.url, args.token)


def list_jobs(args: SimpleNamespace, console: Console) -> int:
    with connect(args) as trainyard:
        filters = {"status": args.status, "labels": args.label, "name": args.name, "group": args.group}
        filters |= {"owner": args.owner, "order": args.order, "discarded": args.discarded}
        jobs = list(trainyard.jobs(**filters, limit=args.limit + 1))
        now = trainyard.server_time
    shown = jobs[: args.limit]
    if args.json:
        console.json_list(shown, has_more=len(jobs) > len(shown))
        return Exit.SUCCEEDED
    if not shown:
        console.error("no jobs; launch one:  trainyard submit --data_path corpus.jsonl")
        return Exit.SUCCEEDED
    rows: list[tuple[str, ...]] = [("ID", "NAME", "GROUP", "STATUS", "STEP", "LOSS", "SCORE", "ETA", "CREATED")]
    rows += [_job_row(job, now) for job in shown]
    # Without a group or a score the list is as narrow as it can be.
    used = [i for i, title in enumerate(rows[0]) if title not in ("GROUP", "SCORE") or any(row[i] for row in rows[1:])]
    header, *lines = [[row[i] for i in used] for row in rows]
    right = frozenset(header.index(title) for title in ("STEP", "LOSS", "SCORE") if title in header)
    console.lines(table(header, lines, right=right))
    if len(jobs) > len(shown):
        console.error(_left_out(args, shown[-1]))
    return Exit.SUCCEEDED


def _left_out(args: SimpleNamespace, oldest: Any) -> str:
    """Return the line that names the jobs that are not in the list, and the command that lists them as well."""
    filters = {"--status": [args.status], "--label": args.label, "--name": [args.name], "--group": [args.group]}
    filters["--owner"] = [args.owner]
    given = [f" {flag} {shlex.quote(value)}" for flag, values in filters.items() for value in values if value]
    given += [f" --order={args.order}"] if args.order else []
    given += [" --discarded"] if args.discarded else []
    which = {None: "before", "newest": "before", "oldest": "after"}.get(args.order)
    left_out = f"created {which} {oldest['id']} ({oldest.get('created_at')})" if which else f"after {oldest['id']}"
    return f"left out: the jobs {left_out}. List more:  trainyard list{''.join(given)} --limit {10 * args.limit}"


def _job_row(job: Any, now: datetime) -> tuple[str, ...]:
    progress = job.get("progress") or {}
    step = f"{count(progress.get('step'))} / {count(progress.get('steps'))}" if progress.get("step") is not None else ""
    loss = fixed(progress.get("loss")) if progress.get("loss") is not None else ""
    eta = duration(progress["eta_seconds"]) if progress.get("eta_seconds") and job["status"] == "running" else ""
    if preparation := job.get("preparation"):
        eta = duration(preparation["eta_seconds"]) if preparation.get("eta_seconds") is not None else ""
    name = one_line(job["name"], 30)
    group, score = job.get("group") or "", job.get("score")
    units = {"eval_loss": " eval", "bpb": " bpb"}
    scored = "" if score is None else f"{fixed(score['value'])}{units.get(score['metric'], '')}"
    status, created = status_word(job["status"]), ago(job.get("created_at"), now)
    return (job["id"], name, one_line(group, 20), status, step, loss, scored, eta, created)


def show(args: SimpleNamespace, console: Console) -> int:
    with connect(args) as trainyard:
        job = find_job(trainyard, args.job, console)
        if args.json:
            console.json(job)
            return Exit.SUCCEEDED
        evaluated = (job.get("progress") or {}).get("eval_loss") is not None
        held_out = trainyard.held_out(job["id"]) if evaluated else {}
        scores = _newest_scores(trainyard, job["id"])
        console.lines(job_page(job, trainyard.server_time, held_out, scores))
    return Exit.SUCCEEDED


def _newest_scores(trainyard: Client, job_id: str) -> list[Any]:
    try:
        return list(trainyard.evaluations(job_id, newest=True))
    except NotFound:
        return []  # a service of 0.1, or the job was deleted just now


NO_POINTS = "no points yet; `trainyard show JOB` has the state of the job"


def metrics(args: SimpleNamespace, console: Console) -> int:
    """Print the points while they are fetched, so that a long curve takes no memory."""
    with connect(args) as trainyard:
        job = find_job(trainyard, args.job, console)
        points = trainyard.metrics(job["id"], after_step=args.after_step, attempt=args.attempt, lineage=args.lineage)
        if args.json:
            console.json_list(list(points))
        elif args.csv:
            sets = [each["name"] for each in (job.get("plan") or {}).get("eval_sets") or ()]
            _print_csv(points, sets, console)
        else:
            _print_points(points, console)
    return Exit.SUCCEEDED


def _print_csv(points: Iterable[Any], sets: Sequence[str], console: Console) -> None:
    """Print one line per point. ``sets``: the held-out sets, each of which has two columns."""
    cells = [f"eval.{name}.{unit}" for name in sets for unit in UNITS]
    source = iter(points)
    first = next(source, None)
    if first is None:
        console.error(NO_POINTS)
        return
    buffer = io.StringIO()
    names = [column for name in first for column in ([name] if name != "eval" else cells)]
    writer = csv.DictWriter(buffer, fieldnames=names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for point in chain([first], source):
        results = point.get("eval") or {}
        found = {f"eval.{name}.{unit}": result.get(unit) for name, result in results.items() for unit in UNITS}
        writer.writerow({**point, **found})
        console.data(buffer.getvalue().rstrip("\n"))
        buffer.seek(0)
        buffer.truncate()


def _print_points(points: Iterable[Any], console: Console) -> None:
    source = iter(points)
    first = next(source, None)
    if first is None:
        console.error(NO_POINTS)
        return
    form = "{:>10}  {:>10}  {:>10}  {:>9}  {:>11}  {:>7}  {:>9}  {:>8}"
    console.data(form.format("STEP", "LOSS", "LR", "GRAD NORM", "TOKENS/S", "BPB", "EVAL LOSS", "EVAL BPB"))
    for point in chain([first], source):
        cells = (
            count(point["step"]),
            "not finite" if point.get("nonfinite") and point.get("loss") is None else fixed(point.get("loss"), 4),
            scientific(point.get("learning_rate")),
            fixed(point.get("grad_norm")),
            count(point.get("tokens_per_second")),
            *("" if point.get(name) is None else fixed(point[name], 4) for name in ("bpb", "eval_loss", "eval_bpb")),
        )
        console.data(form.format(*cells).rstrip())


def events(args: SimpleNamespace, console: Console) -> int:
    return print_list(args, console, Client.events, ("AT", "KIND", "WHAT"), _event_row)


def _event_row(event: Any) -> Row:
    by = "" if event.get("actor") in (None, "") else f"  (by {event['actor']})"
    return (str(event.get("at", UNKNOWN)), str(event.get("kind")), one_line(f"{event.get('message')}{by}", 200))


def attempts(args: SimpleNamespace, console: Console) -> int:
    header = ("ATTEMPT", "TRIGGER", "FROM STEP", "TO STEP", "CREATED", "ENDED", "OUTCOME")
    return print_list(args, console, Client.attempts, header, _attempt_row)


def _attempt_row(attempt: Any) -> Row:
    outcome = ": ".join(str(attempt[key]) for key in ("outcome", "message") if attempt.get(key))
    steps = (count(attempt.get("start_step")), count(attempt.get("end_step")))
    times = (str(attempt.get("created_at") or UNKNOWN), str(attempt.get("ended_at") or UNKNOWN))
    return (str(attempt["number"]), str(attempt.get("trigger")), *steps, *times, one_line(outcome, 160))


def samples(args: SimpleNamespace, console: Console) -> int:
    with connect(args) as trainyard:
        items = trainyard.samples(find_job(trainyard, args.job, console)["id"])
    if args.json:
        console.json_list(items)
        return Exit.SUCCEEDED
    for sample in items:
        note = f"  ({sample['note']})" if sample.get("note") else ""
        console.data(f"step {count(sample['step'])}  {sample['prompt']!r}{note}")
        console.data("  " + str(sample["text"]).replace("\n", "\n  "))
    return Exit.SUCCEEDED


def devices(args: SimpleNamespace, console: Console) -> int:
    with connect(args) as trainyard:
        items = [trainyard.clear_device(args.clear)] if args.clear else trainyard.devices()
    return _print_rows(args, console, items, ("DEVICE", "MODEL", "MEMORY", "LINK", "LEASED TO"), _device_row)


def _device_row(device: Any) -> Row:
    name = one_line(str(device.get("model") or device.get("kind")), CELL)
    return (str(device["id"]), name, size(device.get("memory_bytes")), _link(device), _lease(device))


def _link(device: Any) -> str:
    """How the GPU reaches others: ``nvlink to cuda:1, NUMA node 0``."""
    peers = device.get("nvlink_peers") or []
    link = f"nvlink to {', '.join(map(str, peers))}" if peers else str(device.get("link") or UNKNOWN)
    node = device.get("numa_node")
    return link if node is None else f"{link}, NUMA node {node}"


def _lease(device: Any) -> str:
    foreign = ", ".join(map(str, device.get("processes") or []))
    xids = ", ".join(str(error.get("xid")) for error in device.get("xid_errors") or [])
    # A job that had the GPU before the error keeps it.
    errors = f"XID {xids}: not leased until `trainyard devices --clear {device['id']}`" if xids else ""
    fault = f"not leased: {device['fault']}" if device.get("fault") else ""
    holder = device.get("job_id") or (f"no job, but used by process {foreign}" if foreign else "")
    return "; ".join(part for part in (str(holder), errors, fault) if part) or "free"


def version(args: SimpleNamespace, console: Console) -> int:
    own = installed_version("trainyard")
    with connect(args) as trainyard:
        try:
            service: Any = trainyard.version()
        except ServiceUnreachable as error:
            service = None
            console.error(str(error))
    if args.json:
        console.json({"client": own, "service": service})
        return Exit.SUCCEEDED
    console.data(f"client {own}")
    if service:
        console.data(f"service {service.get('version')} at {trainyard.url}")
    return Exit.SUCCEEDED


def print_list(
    args: SimpleNamespace,
    console: Console,
    read: Callable[[Client, str], Iterable[Any]],
    header: Row,
    row: Callable[[Any], Row],
) -> int:
    """Print the objects of a job that ``read`` returns, as a table or as JSON."""
    with connect(args) as trainyard:
        items = list(read(trainyard, find_job(trainyard, args.job, console)["id"]))
    return _print_rows(args, console, items, header, row)


def _print_rows(
    args: SimpleNamespace, console: Console, items: list[Any], header: Row, row: Callable[[Any], Row]
) -> int:
    if args.json:
        console.json_list(items)
    else:
        console.lines(table(header, [row(item) for item in items]))
    return Exit.SUCCEEDED
