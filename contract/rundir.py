"""Every path of a job and of an attempt, and the way files are published.

Standard library only: the agent imports it before anything else.
"""

import json
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contract.failpoints import failpoint

STEP_DIRECTORY = re.compile(r"step-(\d{8,})")
MILESTONE_DIRECTORY = re.compile(r"step-(\d{8,})-weights")
RANK_FILE = "rank"
"""A rank's number among all, beside the file that torchrun has it write its exception to."""
UNSEEN = "this node does not see the run's directory; the home must be shared by all nodes, under one path"
"""What an agent says in the cluster's own log, because it has no other."""
ATTEMPT_DIRECTORY = re.compile(r"attempt-(\d{4,})")


@dataclass(frozen=True)
class AttemptDir:
    """``runs/<job>/attempt-0001/``: what one launch read, wrote and left behind."""

    path: Path

    @property
    def number(self) -> int:
        """1 for ``attempt-0001``."""
        match = ATTEMPT_DIRECTORY.fullmatch(self.path.name)
        if match is None:
            raise ValueError(f"{self.path} is not an attempt directory")
        return int(match.group(1))

    @property
    def spec(self) -> Path:
        """The resolved job spec this attempt runs."""
        return self.path / "spec.json"

    @property
    def outbox(self) -> Path:
        """What rank 0 wrote, one event a line; the agent ships it."""
        return self.path / "events.jsonl"

    @property
    def progress(self) -> Path:
        """The last optimizer step, rewritten in place at each step: the sign of life between two metric lines."""
        return self.path / "progress"

    def read_step(self) -> int | None:
        """The step in `progress`, or None where there is none yet."""
        try:
            return int(self.progress.read_text())
        except (FileNotFoundError, ValueError):
            return None

    @property
    def started(self) -> Path:
        """The agent's identity (boot id, pid namespace, pid, start time) and its command."""
        return self.path / "started.json"

    @property
    def outcome(self) -> Path:
        """Rank 0's own word on how training ended. Its absence means: unknown."""
        return self.path / "outcome.json"

    @property
    def exit(self) -> Path:
        """The agent's report once nothing of the attempt lives."""
        return self.path / "exit.json"

    @property
    def rendezvous(self) -> Path:
        """Where the ranks of several nodes meet: the first node's agent leaves host and port here for the others."""
        return self.path / "rendezvous.json"

    @property
    def over(self) -> Path:
        """Its existence says that the first node's ranks have ended: the other nodes' end too."""
        return self.path / "over"

    def node(self, number: int) -> Path:
        """How the ranks of node ``number``, not the first, ended: its agent's word to the first node's."""
        return self.path / f"node-{number}.json"

    @property
    def batch(self) -> Path:
        """What the attempt's cluster was given to run."""
        return self.path / "batch.sh"

    @property
    def submitted(self) -> Path:
        """What the cluster said when it took the attempt on: its own id of it."""
        return self.path / "submitted.json"

    @property
    def time_limit(self) -> Path:
        """Its existence says that the cluster will end the attempt soon: it saves, stops, and is started again."""
        return self.path / "time_limit"

    @property
    def stop(self) -> Path:
        """Its existence asks the ranks to save and stop at the next step."""
        return self.path / "stop"

    @property
    def closed(self) -> Path:
        """Its existence says that the attempt is over for the service: an agent that comes late starts nothing."""
        return self.path / "closed"

    @property
    def save(self) -> Path:
        """Its existence asks the ranks to save at the next step and go on; rank 0 removes it once it has heard."""
        return self.path / "save"

    @property
    def settings(self) -> Path:
        """What the user has changed since the attempt began, see `contract.report.RunSettings`."""
        return self.path / "settings.json"

    @property
    def resume_from(self) -> Path:
        """The step of the checkpoint that the attempt is to begin at, as text. None there: at the newest sound one."""
        return self.path / "resume_from"

    def read_resume_from(self) -> int | None:
        """The step in `resume_from`, or None where none was named."""
        try:
            return int(self.resume_from.read_text())
        except FileNotFoundError:
            return None

    @property
    def logs(self) -> Path:
        """Directory of the logs."""
        return self.path / "logs"

    @property
    def agent_log(self) -> Path:
        """What the agent and torchrun itself said."""
        return self.logs / "agent.log"

    def node_log(self, number: int) -> Path:
        """What agent and torchrun said on node ``number``; the first node's is `agent_log`."""
        return self.logs / f"agent-{number}.log" if number else self.agent_log

    @property
    def cluster_log(self) -> Path:
        """What the cluster itself printed."""
        return self.logs / "cluster.log"

    @property
    def torchrun_logs(self) -> Path:
        """torchrun's ``--log-dir``: it keeps each rank's error.json below."""
        return self.logs / "torchrun"

    def rank_log(self, rank: int) -> Path:
        """Everything rank ``rank`` printed."""
        return self.logs / f"rank-{rank}.log"


@dataclass(frozen=True)
class RunDir:
    """``runs/<job>/``: everything of one job. By hand it is any directory that holds a ``spec.json``."""

    path: Path

    @property
    def spec(self) -> Path:
        """The spec of a run started by hand; the service writes one for each attempt instead."""
        return self.path / "spec.json"

    @property
    def launch_lock(self) -> Path:
        """Held exclusively by the agent of the one attempt that may live."""
        return self.path / "launch.lock"

    @property
    def alive_lock(self) -> Path:
        """Held shared by torchrun and by every rank: whoever can take it exclusively knows that none is left."""
        return self.path / "alive.lock"

    @property
    def current(self) -> Path:
        """The number of the attempt that may run, written under the launch lock; a late rank of another one ends."""
        return self.path / "current"

    @property
    def fork(self) -> Path:
        """What the job is a fork of, as `contract.report.Fork`. None there: it is no fork."""
        return self.path / "fork.json"

    @property
    def corpus_cache(self) -> Path:
        """Token shards of a run without a service; the service has one cache for all jobs."""
        return self.path / "corpus"

    def attempt(self, number: int) -> AttemptDir:
        """The directory of attempt ``number``, which counts from 1."""
        return AttemptDir(self.path / f"attempt-{number:04d}")

    def attempts(self) -> Iterator[AttemptDir]:
        """The attempts on disk, oldest first."""
        if not self.path.is_dir():
            return
        found = [AttemptDir(p) for p in self.path.iterdir() if ATTEMPT_DIRECTORY.fullmatch(p.name)]
        yield from sorted(found, key=lambda attempt: attempt.number)

    def products(self, save_dir: str | None, job_name: str | None = None) -> "ProductDir":
        """Where checkpoints and weights go: here, or ``save_dir/<job>/`` so that no job overwrites another's."""
        if save_dir is None:
            return ProductDir(self.path)
        return ProductDir(Path(save_dir) / (job_name or self.path.name))


@dataclass(frozen=True)
class ProductDir:
    """Where a job's checkpoints and weights files are: the run directory itself, or a directory below ``save_dir``."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Directory of the published checkpoints."""
        return self.path / "checkpoints"

    @property
    def out(self) -> Path:
        """Directory of weights-only files under MiniMind's names."""
        return self.path / "out"

    @property
    def origin(self) -> Path:
        """What a fork has of its parent: the same files by another name, until the first attempt has begun."""
        return self.path / "origin"

    @property
    def exports(self) -> Path:
        """Directory of what was exported, see `export`."""
        return self.path / "exports"

    def export(self, step: int, form: str) -> Path:
        """Where the checkpoint of ``step`` is exported to in the format ``form``: hf or minimind."""
        return self.exports / f"step-{step:08d}-{form}"

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint of optimizer step ``step`` is published."""
        return self.checkpoints / f"step-{step:08d}"

    def milestone(self, step: int) -> Path:
        """Where the weights of step ``step`` are kept once nothing else of its checkpoint is."""
        return self.checkpoints / f"step-{step:08d}-weights"

    def weights(self, save_weight: str, hidden_size: int, use_moe: bool) -> Path:
        """MiniMind's file name: ``pretrain_512.pth``, or ``pretrain_512_moe.pth``."""
        return self.out / f"{save_weight}_{hidden_size}{'_moe' if use_moe else ''}.pth"

    @failpoint("resume.list")
    def published(self) -> list[tuple[int, Path]]:
        """(step, path) of every published checkpoint, newest first. Published does not mean verified."""
        return self._directories(STEP_DIRECTORY)

    def milestones(self) -> list[tuple[int, Path]]:
        """(step, path) of every milestone of which only the weights are left, newest first."""
        return self._directories(MILESTONE_DIRECTORY)

    @failpoint("resume.directories")
    def _directories(self, pattern: re.Pattern[str]) -> list[tuple[int, Path]]:
        try:
            entries = list(self.checkpoints.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []  # not made yet, or deleted with its job just now
        found = [(pattern.fullmatch(p.name), p) for p in entries if p.is_dir()]
        return sorted(((int(m.group(1)), p) for m, p in found if m), reverse=True)


def write_atomically(path: Path, data: bytes) -> None:
    """Publish ``data`` as ``path``: readers see the old file or the whole new one, also after a power cut."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def write_json(path: Path, value: Any) -> None:
    """`write_atomically` for strict JSON: NaN and infinity raise ValueError."""
    write_atomically(path, json.dumps(value, allow_nan=False, ensure_ascii=True, indent=1).encode() + b"\n")


def read_json(path: Path) -> Any | None:
    """The value in ``path``, or None where there is no such file."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None


def fsync_directory(path: Path) -> None:
    """Make a rename in ``path`` survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
