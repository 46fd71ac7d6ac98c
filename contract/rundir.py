"""Paths of a job and its attempts, and how files and directories are published.

Standard library only: the agent imports it before anything else.
"""

import contextlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainyard.contract.allowed_paths import directory_inside, new_directory
from trainyard.contract.failpoints import failpoint

STEP_DIRECTORY = re.compile(r"step-(\d{8,})")
MILESTONE_DIRECTORY = re.compile(r"step-(\d{8,})-weights")
RANK_FILE = "rank"
"""Name of the file with a rank's global number, next to the file in which torchrun has it write its exception."""
UNSEEN = "this node does not see the run's directory; the home must be shared by all nodes, under one path"
"""Message of an agent in the cluster's log, the only one that it can write to."""
ATTEMPT_DIRECTORY = re.compile(r"attempt-(\d{4,})")

MODEL_FILE, OPTIMIZER_FILE, STATE_FILE = "model.safetensors", "optimizer.safetensors", "state.json"
CHECKPOINT_FILES = (MODEL_FILE, OPTIMIZER_FILE, STATE_FILE)
MANIFEST_FILE = "manifest.json"
"""Names and sha256 of a checkpoint's files. It is written last."""
SAVING_PREFIX, REMOVING_PREFIX = ".saving-", ".removing-"
"""Checkpoints that are being written or deleted. The next attempt deletes what is left of them."""
INVALID_PREFIX, SUPERSEDED_PREFIX = ".invalid-", ".superseded-"
"""Checkpoints that were found damaged, and those after the step that the user went back to."""


OUTBOX_TAIL = 1 << 16
"""Bytes at the end of an outbox in which the last metric line is searched."""


def _seconds_in_progress(file: Path) -> Iterator[float]:
    with contextlib.suppress(OSError, ValueError):
        if math.isfinite(seconds := float(file.read_text().partition("\n")[2])):
            yield seconds


def _seconds_in_outbox(file: Path) -> Iterator[float]:
    try:
        with file.open("rb") as outbox:
            outbox.seek(max(0, outbox.seek(0, os.SEEK_END) - OUTBOX_TAIL))
            lines = outbox.read().splitlines()
    except OSError:
        return
    for line in lines:
        with contextlib.suppress(ValueError, AttributeError):
            seconds = json.loads(line).get("train_seconds") if b'"train_seconds":' in line else None
            if isinstance(seconds, int | float) and math.isfinite(seconds):
                yield float(seconds)


@dataclass(frozen=True)
class AttemptDir:
    """``runs/<job>/attempt-0001/``: the files of one launch."""

    path: Path

    @property
    def number(self) -> int:
        """The attempt's number: 1 for ``attempt-0001``."""
        match = ATTEMPT_DIRECTORY.fullmatch(self.path.name)
        if match is None:
            raise ValueError(f"{self.path} is not an attempt directory")
        return int(match.group(1))

    @property
    def spec(self) -> Path:
        """The resolved job spec of this attempt."""
        return self.path / "spec.json"

    @property
    def prepare(self) -> Path:
        """If it exists, the attempt prepares a corpus and trains nothing: a `contract.prepared.PrepareTask`."""
        return self.path / "prepare.json"

    @property
    def outbox(self) -> Path:
        """Events of rank 0, one a line; the agent sends them to the service."""
        return self.path / "events.jsonl"

    @property
    def progress(self) -> Path:
        """The last optimizer step, rewritten in place at each step: the heartbeat between two metric lines.

        Its second line is the active training time of all attempts until then, in seconds.
        """
        return self.path / "progress"

    def read_step(self) -> int | None:
        """Return the step in `progress`, or None if there is none yet."""
        try:
            return int(self.progress.read_text().partition("\n")[0])
        except (FileNotFoundError, ValueError):
            return None

    def read_train_seconds(self) -> float | None:
        """Return the seconds of active training of this and all earlier attempts, or None if it has counted none.

        After a kill, the time of the step that was running is missing. The progress file is newer than the last metric
        line, but a host that lost its power may have lost it.
        """
        counted = [*_seconds_in_progress(self.progress), *_seconds_in_outbox(self.outbox)]
        return max(counted, default=None)

    @property
    def started(self) -> Path:
        """The agent's identity (boot id, pid namespace, pid, start time) and its command."""
        return self.path / "started.json"

    @property
    def outcome(self) -> Path:
        """How training ended, as rank 0 recorded it. If it is missing, the outcome is unknown."""
        return self.path / "outcome.json"

    @property
    def exit(self) -> Path:
        """The agent's report, written when no process of the attempt is left."""
        return self.path / "exit.json"

    @property
    def rendezvous(self) -> Path:
        """Host and port at which the ranks of several nodes meet, written by the first node's agent."""
        return self.path / "rendezvous.json"

    @property
    def over(self) -> Path:
        """If it exists, the first node's ranks have ended, and those of the other nodes must end too."""
        return self.path / "over"

    def node(self, number: int) -> Path:
        """How the ranks of node ``number`` (not the first) ended, written by its agent for the first node's."""
        return self.path / f"node-{number}.json"

    @property
    def batch(self) -> Path:
        """The batch script that was submitted to the cluster."""
        return self.path / "batch.sh"

    @property
    def submitted(self) -> Path:
        """The cluster's answer to the submission: its own job id."""
        return self.path / "submitted.json"

    @property
    def time_limit(self) -> Path:
        """If it exists, the cluster will soon end the attempt: it saves, stops, and is started again."""
        return self.path / "time_limit"

    @property
    def stop(self) -> Path:
        """If it exists, the ranks save and stop at the next step."""
        return self.path / "stop"

    @property
    def closed(self) -> Path:
        """If it exists, the service has given up the attempt: an agent that starts late must not launch it."""
        return self.path / "closed"

    @property
    def save(self) -> Path:
        """If it exists, the ranks save at the next step and continue; rank 0 removes it when it has read it."""
        return self.path / "save"

    @property
    def settings(self) -> Path:
        """Settings that the user changed after the attempt had started, see `contract.messages.RunSettings`."""
        return self.path / "settings.json"

    @property
    def resume_from(self) -> Path:
        """The step of the checkpoint to resume from, as text. Without it: the newest valid one."""
        return self.path / "resume_from"

    def read_resume_from(self) -> int | None:
        """Return the step in `resume_from`, or None if there is none."""
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
        """Output of the agent and of torchrun itself."""
        return self.logs / "agent.log"

    def node_log(self, number: int) -> Path:
        """Output of agent and torchrun on node ``number``; for the first node it is `agent_log`."""
        return self.logs / f"agent-{number}.log" if number else self.agent_log

    @property
    def cluster_log(self) -> Path:
        """Output of the cluster itself."""
        return self.logs / "cluster.log"

    @property
    def torchrun_logs(self) -> Path:
        """The ``--log-dir`` of torchrun, which has each rank's error.json below it."""
        return self.logs / "torchrun"

    def rank_log(self, rank: int) -> Path:
        """Output of rank ``rank``."""
        return self.logs / f"rank-{rank}.log"


@dataclass(frozen=True)
class RunDir:
    """``runs/<job>/``: the files of one job. For a run without a service: any directory with a ``spec.json``."""

    path: Path

    @property
    def spec(self) -> Path:
        """The spec of a run without a service. The service writes one for each attempt instead."""
        return self.path / "spec.json"

    @property
    def launch_lock(self) -> Path:
        """Held exclusively by the agent of the only attempt that may run."""
        return self.path / "launch.lock"

    @property
    def alive_lock(self) -> Path:
        """Held shared by torchrun and by every rank: a process that gets it exclusively knows that none is left."""
        return self.path / "alive.lock"

    @property
    def current(self) -> Path:
        """The number of the attempt that may run, written under the launch lock. A late rank of another one exits."""
        return self.path / "current"

    @property
    def fork(self) -> Path:
        """The parent of the job, as `contract.messages.Fork`. Without it the job is no fork."""
        return self.path / "fork.json"

    @property
    def corpus_cache(self) -> Path:
        """Token shards of a run without a service. The service has one cache for all jobs."""
        return self.path / "corpus"

    def attempt(self, number: int) -> AttemptDir:
        """Return the directory of attempt ``number``, which counts from 1."""
        return AttemptDir(self.path / f"attempt-{number:04d}")

    def attempts(self) -> Iterator[AttemptDir]:
        """Yield the attempts on disk, oldest first."""
        if not self.path.is_dir():
            return
        found = [AttemptDir(p) for p in self.path.iterdir() if ATTEMPT_DIRECTORY.fullmatch(p.name)]
        yield from sorted(found, key=lambda attempt: attempt.number)

    def train_seconds(self) -> float:
        """Return the seconds of active training of all attempts together: the time that limits.max_minutes limits.

        It is the time in phase training. Loading, compiling, evaluating, and waiting for a save do not count. Steps
        that a later attempt repeats do: their time is spent. Each attempt continues the count of those before it.
        """
        return max((attempt.read_train_seconds() or 0.0 for attempt in self.attempts()), default=0.0)

    def save_dirs(self) -> list[str | None]:
        """Return each ``save_dir`` that an attempt had; a resume may change it."""
        found: dict[str | None, None] = {}
        for attempt in self.attempts():
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                found[json.loads(attempt.spec.read_bytes())["checkpoint"]["save_dir"]] = None
        return list(found)

    def artifacts(self, save_dir: str | None, job_name: str | None = None) -> "ArtifactDir":
        """Return where checkpoints and weights go: here, or ``save_dir/<job>/``, one directory a job."""
        if save_dir is None:
            return ArtifactDir(self.path)
        return ArtifactDir(Path(save_dir) / (job_name or self.path.name))

    def artifact_dirs(self, save_dir: str | None) -> Iterator["ArtifactDir"]:
        """Yield the directory for ``save_dir``, then those of earlier attempts.

        A resume may change ``save_dir``, and the next attempt moves the files only when it starts.
        """
        yield self.artifacts(save_dir)
        yield from (self.artifacts(earlier) for earlier in self.save_dirs() if earlier != save_dir)

    def find_directory(self, save_dir: str | None, part: Callable[["ArtifactDir"], Path]) -> Path:
        """Return the first ``part`` of `artifact_dirs` that is a directory, else that for ``save_dir``."""
        paths = [part(artifacts) for artifacts in self.artifact_dirs(save_dir)]
        return next((path for path in paths if path.is_dir()), paths[0])


@dataclass(frozen=True)
class ArtifactDir:
    """The directory of a job's checkpoints and weights: the run directory itself, or one below ``save_dir``."""

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
        """The parent's checkpoint in a fork: links to its files, until the first attempt has started."""
        return self.path / "origin"

    @property
    def exports(self) -> Path:
        """Directory of the exports, see `export`."""
        return self.path / "exports"

    def evaluation(self, evaluation_id: str) -> Path:
        """Return where the weights of an evaluation are until it has ended: links to those of its checkpoint."""
        return self.path / "evaluations" / evaluation_id

    def export(self, step: int, form: str) -> Path:
        """Return where the checkpoint of ``step`` is exported to, in the format ``form``: hf or minimind."""
        return self.exports / f"step-{step:08d}-{form}"

    def checkpoint(self, step: int) -> Path:
        """Return where the checkpoint of optimizer step ``step`` is published."""
        return self.checkpoints / f"step-{step:08d}"

    def milestone(self, step: int) -> Path:
        """Return where the weights of step ``step`` are kept when the rest of its checkpoint is deleted."""
        return self.checkpoints / f"step-{step:08d}-weights"

    def weights(self, save_weight: str, hidden_size: int, use_moe: bool) -> Path:
        """Return the path with MiniMind's file name: ``pretrain_512.pth``, or ``pretrain_512_moe.pth``."""
        return self.out / weights_name(save_weight, hidden_size, use_moe)

    @failpoint("resume.list")
    def published(self) -> list[tuple[int, Path]]:
        """Return (step, path) of every published checkpoint, newest first. They are not verified."""
        return self._directories(STEP_DIRECTORY)

    def milestones(self) -> list[tuple[int, Path]]:
        """Return (step, path) of every checkpoint of which only the weights are left, newest first."""
        return self._directories(MILESTONE_DIRECTORY)

    @failpoint("resume.directories")
    def _directories(self, pattern: re.Pattern[str]) -> list[tuple[int, Path]]:
        try:
            entries = list(self.checkpoints.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []  # not created yet, or just deleted with its job
        found = [(pattern.fullmatch(p.name), p) for p in entries if p.is_dir()]
        return sorted(((int(m.group(1)), p) for m, p in found if m), reverse=True)


def weights_name(stem: str, hidden_size: int, use_moe: bool) -> str:
    """Return MiniMind's name of a weights file: ``pretrain_512.pth``, or ``pretrain_512_moe.pth``."""
    return f"{stem}_{hidden_size}{'_moe' if use_moe else ''}.pth"


def find_named_weights(folder: Path, name: str, own: str | None = None) -> list[Path]:
    """Return the weights files called ``name`` in ``folder`` and in the directories of its jobs, newest first.

    ``own``: name of the directory of a job that is left out.
    """
    try:
        jobs = [entry for entry in sorted(folder.iterdir()) if entry.name != own and entry.is_dir()]
    except OSError:
        return []
    found: list[tuple[float, Path]] = []
    for path in (folder / name, *(ArtifactDir(job).out / name for job in jobs)):
        with suppress(OSError, ValueError):
            if path.is_file():
                found.append((path.stat().st_mtime, path))
    return [path for _, path in sorted(found, key=lambda pair: -pair[0])]


@dataclass(frozen=True)
class FileDigest:
    """Size in bytes and sha256 (hex) of a file, as a checkpoint's manifest has them."""

    bytes: int
    sha256: str


def manifest_json(files: Mapping[str, FileDigest]) -> bytes:
    """Return the content of a checkpoint's manifest: {"files": {name: {"bytes": n, "sha256": hex}}}."""
    manifest = {"files": {name: asdict(digest) for name, digest in files.items()}}
    return json.dumps(manifest, allow_nan=False, indent=1).encode() + b"\n"


def parse_manifest(data: bytes) -> dict[str, FileDigest]:
    """Return the files that a manifest lists; the inverse of `manifest_json`.

    The names are not checked. Raises ValueError, KeyError, TypeError or AttributeError if ``data`` is no manifest.
    """
    try:
        files = json.loads(data)["files"]
    except RecursionError:
        raise ValueError("nested too deep") from None
    manifest = {name: FileDigest(file["bytes"], file["sha256"]) for name, file in files.items()}
    for name, digest in manifest.items():
        if type(digest.bytes) is not int or digest.bytes < 0 or not isinstance(digest.sha256, str):
            raise ValueError(f"has no size or no sha256 of {name!r}")
    return manifest


@contextmanager
def atomic_directory(final: Path, temporary: Path, roots: Sequence[Path] = ()) -> Iterator[Path]:
    """Create ``temporary`` to write in, and rename it to ``final`` when the block ends. Both have the same parent.

    Yields a path that stays valid if a directory is replaced by a link meanwhile.
    ``roots``: see `contract.allowed_paths.open_inside`. After an error ``temporary`` is deleted. Files must be fsynced
    by the caller. Raises OSError.
    """
    with directory_inside(final.parent, roots, create=True) as parent:
        try:
            with new_directory(parent / temporary.name) as directory:
                yield directory
            publish_directory(parent / temporary.name, parent / final.name)
        except BaseException:
            shutil.rmtree(parent / temporary.name, ignore_errors=True)
            raise


def publish_directory(temporary: Path, final: Path) -> None:
    """Rename ``temporary`` to ``final``: readers see all of it or nothing, also after a power cut. Raises OSError.

    Files in it must be fsynced before. Both must have the same parent directory.
    """
    fsync_directory(temporary)
    temporary.rename(final)
    fsync_directory(final.parent)


def write_atomically(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Replace ``path`` with ``data``: readers see the old file or all of the new one.

    If ``durable``, this also holds after a power cut.
    """
    temporary = temporary_file(path)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        fsync_directory(path.parent)


def temporary_file(path: Path) -> Path:
    """Create an empty file with a new name in the directory of ``path``. Raises OSError.

    Its mode follows the umask, so that other users can read what is published. That of `tempfile` is 0600.
    """
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
        except FileExistsError:
            continue
        return temporary


def write_json(path: Path, value: Any, indent: int | None = 1, *, durable: bool = True) -> None:
    """Write strict JSON with `write_atomically`. Raises ValueError for NaN and infinity.

    Without ``indent`` it is ten times as fast: for long lists.
    """
    text = json.dumps(value, allow_nan=False, ensure_ascii=True, indent=indent)
    write_atomically(path, text.encode() + b"\n", durable=durable)


def read_json(path: Path) -> Any | None:
    """Return the JSON value in ``path``, or None if there is no such file."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None


def fsync_directory(path: Path) -> None:
    """Make renames in the directory ``path`` survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
