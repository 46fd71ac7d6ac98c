"""`trainyard checkpoints`: list, download or delete."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from trainyard.client.api import Client
from trainyard.client.cli.commands.show import Row, connect, print_list
from trainyard.client.cli.console import Console
from trainyard.client.cli.find import find_job
from trainyard.client.cli.formatting import UNKNOWN, count, fixed, one_line, size
from trainyard.client.exit_codes import Exit, UsageError

HEADER = ("STEP", "KIND", "LOSS", "SIZE", "SHA256", "PATH")


def checkpoints(args: SimpleNamespace, console: Console) -> int:
    """List the checkpoints, or do what ``--download`` or ``--delete`` requests."""
    if args.download is not None and args.delete is not None:
        raise UsageError("give either --download or --delete")
    if args.download is not None:
        return _download(args, console)
    if args.delete is not None:
        return _delete(args, console)
    return print_list(args, console, Client.checkpoints, HEADER, _row)


def _row(checkpoint: Any) -> Row:
    step, loss = count(checkpoint["step"]), fixed(checkpoint.get("loss"), 4)
    sha256, path = str(checkpoint.get("sha256") or UNKNOWN), str(checkpoint.get("path"))
    return (step, str(checkpoint.get("kind")), loss, size(checkpoint.get("bytes")), sha256, path)


def _download(args: SimpleNamespace, console: Console) -> int:
    with connect(args) as trainyard:
        job_id = find_job(trainyard, args.job, console)["id"]
        into = Path(args.out or f"{job_id}-step-{args.download}")
        names = trainyard.download(job_id, args.download, into)
    if args.json:
        console.json({"job_id": job_id, "step": args.download, "path": str(into), "files": names})
        return Exit.SUCCEEDED
    console.data(str(into))
    console.error(f"{len(names)} files; their checksums match the manifest")
    return Exit.SUCCEEDED


def _delete(args: SimpleNamespace, console: Console) -> int:
    with connect(args) as trainyard:
        job = trainyard.find(args.job)
        question = f"Delete the checkpoint of step {count(args.delete)} of {one_line(job['name'], 60)} ({job['id']})?"
        if not console.require_consent(question, args.yes):
            console.error("nothing was deleted")
            return Exit.REJECTED
        trainyard.delete_checkpoint(job["id"], args.delete)
    if args.json:
        console.json({"job_id": job["id"], "step": args.delete, "deleted": True})
    else:
        console.error(f"deleted the checkpoint of step {count(args.delete)}")
    return Exit.SUCCEEDED
