"""Slurm's commands as fake programs in PATH that print what a test sets: no cluster is needed."""

import json
import shlex
from pathlib import Path
from typing import Any

RUNNING: dict[str, Any] = {
    "job_id": 7,
    "name": "trainyard-job_a",
    "comment": "job_a/1",
    "job_state": "RUNNING",
    "state_reason": "None",
    "state_description": "",
    "nodes": "node[1-2]",
    "gres_detail": [],
}
"""A job as squeue 22.05 prints it, with the fields that the launcher reads."""

CONFIG = "Configuration data as of now\nClusterName             = {name}\nSlurmctldHost[0]        = login1\n"


class Programs:
    """``squeue``, ``sbatch``, ``scancel``, ``scontrol`` in ``bin``. `calls` returns the recorded calls."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self._calls = folder / "calls"
        self._queue = folder / "queue.json"
        self.bin.mkdir()
        self._calls.touch()
        self.queue()
        self.says("sbatch", "8\n")
        self.says("scancel")
        self.says("scontrol", CONFIG.format(name="here"))
        self.body("squeue", f"cat {shlex.quote(str(self._queue))}")

    def body(self, name: str, script: str) -> None:
        """Set the program's shell script."""
        program = self.bin / name
        noted = f'echo "{name} $*" >> {shlex.quote(str(self._calls))}'
        program.write_text(f"#!/bin/sh\n{noted}\n{script}\n")
        program.chmod(0o755)

    def says(self, name: str, out: str = "", error: str = "", code: int = 0) -> None:
        """Make the program print ``out`` and ``error`` and exit with ``code``."""
        printed = f"printf %s {shlex.quote(out)}\nprintf %s {shlex.quote(error)} >&2\nexit {code}"
        self.body(name, printed)

    def queue(self, *jobs: dict[str, Any]) -> None:
        """Set squeue's output: ``jobs``, each over `RUNNING`."""
        self._queue.write_text(json.dumps({"jobs": [{**RUNNING, **job} for job in jobs]}))

    def takes_and(self, script: str) -> None:
        """Make sbatch accept the job and then run ``script``."""
        taken = json.dumps({"jobs": [{**RUNNING, "job_state": "PENDING", "nodes": ""}]})
        self.body("sbatch", f"printf %s {shlex.quote(taken)} > {shlex.quote(str(self._queue))}\n{script}")

    def calls(self, name: str) -> list[str]:
        """Return the arguments of all calls of one program."""
        lines = self._calls.read_text().splitlines()
        return [line.partition(" ")[2] for line in lines if line.partition(" ")[0] == name]
