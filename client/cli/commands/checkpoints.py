"""`trainyard checkpoints`: list them, fetch one, or remove one."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from trainyard.client.api import Client
from trainyard.client.cli.commands.show import Row, connect, rows
from trainyard.client.cli.console import Console
from trainyard.client.cli.formatting import (
    UNKNOWN,
    count,
    fixed,
    one_line,
    size,
)
from trainyard.client.exit_codes import Exit, UsageError

HEADER = ("STEP", "KIND", "LOSS", "SIZE", "SHA256", "PATH")


def checkpoints(args: SimpleNamespace, console: Console) -> int:
    """`trainyard checkpoints`, with ``--download`` or ``--delete`` where given."""
    if args.download is not None and args.delete is not None:
        raise UsageError("give either --download or --delete")
    if args.download is not None:
        return _download(args, console)
    if args.delete is not None:
        return _delete(args, console)
    return rows(args, console, Client.checkpoints, HEADER, _row)


def _row(found: Any) -> Row:
    sha256 = str(found.get("sha256") or UNKNOWN)
    words = (count(found["step"]), str(found.get("kind")), fixed(found.get("loss"), 4), size(found.get("bytes")))
    return (*words, sha256, str(found.get("path")))


def _download(args: SimpleNamespace, console: Console) -> int:
    with connect(args) as trainyard:
        job_id = trainyard.find(args.job)["id"]
        into = Path(args.out or f"{job_id}-step-{args.download}")
        names = trainyard.download(job_id, args.download, into)
    if args.json:
        console.json({"job_id": job_id, "step": args.download, "path": str(into), "files": names})
        return Exit.SUCCEEDED
    console.data(str(into))
    console.error(f"{len(names)} files, each as the manifest says")
    return Exit.SUCCEEDED


def _delete(args: SimpleNamespace, console: Console) -> int:
    with connect(args) as trainyard:
        job = trainyard.find(args.job)
        question = f"Delete the checkpoint of step {count(args.delete)} of {one_line(job['name'], 60)} ({job['id']})?"
        if console.interactive and not args.yes and not console.confirm(question):
            console.error("nothing was deleted")
            return Exit.REFUSED
        trainyard.delete_checkpoint(job["id"], args.delete)
    if args.json:
        console.json({"job_id": job["id"], "step": args.delete, "deleted": True})
    else:
        console.error(f"deleted the checkpoint of step {count(args.delete)}")
    return Exit.SUCCEEDED
