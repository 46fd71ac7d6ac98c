"""Runs attempts on this host: a detached agent for each, which outlives the service."""

import contextlib
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from contract.locks import is_held
from contract.outbox import OutboxReader
from contract.processes import MARKER, ProcessIdentity, boot_id, marked, pid_namespace, signal_all, wait_gone
from contract.report import ErrorCard, ExitReport, Outcome, read_message
from contract.rundir import AttemptDir, RunDir, read_json, write_atomically
from contract.status import Reason
from service.launch.base import AttemptName, Found, Launch, LaunchRefused, State

WORKER_AGENT = (sys.executable, "-P", "-m", "worker.agent")
"""All that the service knows of the worker. -P: a folder named worker/ where the service was started is not ours."""

INHERITED = (
    "PATH",
    "HOME",
    "USER",
    "LANG",
    "LC_ALL",
    "TZ",
    "TMPDIR",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
    "VIRTUAL_ENV",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
)
INHERITED_PREFIXES = (
    "CUDA_",
    "NVIDIA_",
    "NCCL_",
    "GLOO_",
    "TORCH_",
    "PYTORCH_",
    "OMP_",
    "GOMP_",
    "MKL_",
    "KMP_",
    "WANDB_",
    "HF_",
)
"""Environment variables that reach a worker. All others, the service's secrets among them, stay here."""

END_SIGNALS = (signal.SIGCONT, signal.SIGKILL)
END_SECONDS = 5.0
LOG_TAIL_BYTES = 4096

log = logging.getLogger("trainyard")


class LocalLauncher:
    """A launcher whose facts are the kernel's: locks, marked processes, and the files of the attempt."""

    def __init__(
        self,
        home: Path,
        corpus_cache: Path,
        data_roots: Sequence[Path] = (),
        save_roots: Sequence[Path] = (),
        agent: tuple[str, ...] = WORKER_AGENT,
    ) -> None:
        self._home = home
        self._agent = agent
        # The home is always among them, so that neither list is empty: to the worker an empty one means no limits.
        self._roots = {
            "TRAINYARD_DATA_ROOTS": (*data_roots, home),
            "TRAINYARD_SAVE_ROOTS": (*save_roots, home),
        }
        self._corpus_cache = corpus_cache
        self._agents: dict[AttemptName, int] = {}
        self._readers: dict[AttemptName, OutboxReader] = {}

    def start(self, launch: Launch) -> None:
        """Write the spec and start the agent, detached. A second call for the same attempt does nothing."""
        for earlier in list(self._agents):
            self._reap(earlier)
        attempt = self._attempt(launch.name)
        if self.find(launch.name).state is not State.ABSENT or attempt.closed.exists():
            return
        try:
            attempt.logs.mkdir(parents=True, exist_ok=True)
            self._corpus_cache.mkdir(parents=True, exist_ok=True)
            if launch.resume_step is not None:
                write_atomically(attempt.resume_from, f"{launch.resume_step}\n".encode())
            write_atomically(attempt.spec, launch.spec.model_dump_json(indent=1).encode() + b"\n")
            self._agents[launch.name] = self._spawn(launch, attempt)
            log.info("the agent was started", extra={**launch.name.fields, "pid": self._agents[launch.name]})
        except OSError as error:
            raise LaunchRefused(f"the attempt could not be started: {error}") from error

    def _spawn(self, launch: Launch, attempt: AttemptDir) -> int:
        command = [*self._agent, str(attempt.path.parent), f"--attempt={launch.name.number}"]
        append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        return os.posix_spawn(
            command[0],
            command,
            self._environment(launch),
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, str(attempt.agent_log), append, 0o644),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
            # A pipe or a shared session would end the run together with the service or the terminal.
            setsid=True,
        )

    def _environment(self, launch: Launch) -> dict[str, str]:
        cuda = [device.removeprefix("cuda:") for device in launch.devices if device.startswith("cuda:")]
        service = read_json(self._home / "service.json") or {}
        return {
            **inherited(dict(os.environ)),
            # The worker is found where the service's own code is, installed or not.
            "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
            MARKER: str(launch.name),
            "CUDA_VISIBLE_DEVICES": ",".join(cuda),
            "TRAINYARD_CORPUS_CACHE": str(self._corpus_cache),
            # The worker looks again at each path: a link may have been changed since the spec was accepted.
            **{name: ":".join(map(str, roots)) for name, roots in self._roots.items()},
            "TRAINYARD_REPORT_URL": str(service.get("url", "")),
            "TRAINYARD_SERVICE_FILE": str(self._home / "service.json"),
            "TRAINYARD_ATTEMPT_ID": launch.attempt_id,
            "TRAINYARD_ATTEMPT_TOKEN": launch.token,
        }

    def find(self, name: AttemptName) -> Found:
        """What the kernel and the files say. The order matters: exit.json is written only when nothing lives."""
        self._reap(name)
        attempt = self._attempt(name)
        report = read_message(ExitReport, attempt.exit)
        if report is not None:
            return Found(State.ENDED, report)
        processes = marked(str(name))
        if any(_is_agent(process) for process in processes):
            return Found(State.ALIVE)
        if processes or self._ranks_hold_lock(name):
            return Found(State.ORPHANED)
        # Looked at once more: an agent that ended between the two looks has published its report by now.
        report = read_message(ExitReport, attempt.exit)
        if report is not None:
            return Found(State.ENDED, report)
        if attempt.started.exists():
            return Found(State.ENDED, _deduced(attempt))
        if attempt.agent_log.exists() and attempt.closed.exists():
            return Found(State.ENDED, _never_began(attempt))
        return Found(State.ABSENT)

    def _ranks_hold_lock(self, name: AttemptName) -> bool:
        """Processes that cannot be seen from here, as from another container, still hold the kernel's lock."""
        run = self._run(name)
        try:
            current = run.current.read_text().strip()
        except FileNotFoundError:
            return False
        return current == str(name.number) and is_held(run.alive_lock)

    def stop(self, name: AttemptName) -> None:
        """Leave the wish where the ranks look for it at each step."""
        attempt = self._attempt(name)
        if attempt.path.is_dir():
            attempt.stop.touch()

    def save(self, name: AttemptName) -> None:
        """Leave the wish where rank 0 looks for it at each step."""
        attempt = self._attempt(name)
        if attempt.path.is_dir():
            attempt.save.touch()

    def end(self, name: AttemptName) -> None:
        """SIGKILL whatever carries the attempt's mark, until there is nothing; and let nothing of it begin any more.

        The word that it is over is left first. An agent can be seen before it looks for that word: so either it
        finds it, or we find the agent.
        """
        attempt = self._attempt(name)
        with contextlib.suppress(OSError):  # a full disk must not keep us from ending what lives
            attempt.path.mkdir(parents=True, exist_ok=True)
            attempt.closed.touch()
        for _ in range(3):
            found = marked(str(name))
            if not found:
                break
            log.warning("ending what lives of an attempt", extra={**name.fields, "processes": len(found)})
            signal_all(found, *END_SIGNALS)
            self._reap(name)
            wait_gone(found, END_SECONDS)

    def unread(self, name: AttemptName, after_seq: int, limit: int) -> list[dict[str, Any]]:
        """Lines of the outbox that the service does not have yet."""
        reader = self._readers.setdefault(name, OutboxReader(self._attempt(name).outbox))
        reader.rewind_to(after_seq)
        lines = reader.read(limit)
        if not lines:
            del self._readers[name]
        return lines

    def _reap(self, name: AttemptName) -> None:
        """Collect the agent's exit status, if it is ours and has ended: a zombie would keep its pid for nothing."""
        pid = self._agents.get(name)
        if pid is None:
            return
        try:
            ended, _ = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            ended = pid
        if ended == pid:
            del self._agents[name]

    def _run(self, name: AttemptName) -> RunDir:
        return RunDir(self._home / "runs" / name.job_id)

    def _attempt(self, name: AttemptName) -> AttemptDir:
        return self._run(name).attempt(name.number)


def inherited(environment: dict[str, str]) -> dict[str, str]:
    """The part of the service's environment that a worker gets."""
    return {
        name: value for name, value in environment.items() if name in INHERITED or name.startswith(INHERITED_PREFIXES)
    }


def _is_agent(process: ProcessIdentity) -> bool:
    """Only the agent has what it takes to report; it keeps that from the processes it starts."""
    return process.variable("TRAINYARD_ATTEMPT_TOKEN") is not None


def _deduced(attempt: AttemptDir) -> ExitReport:
    """The end of an attempt whose agent left no report: rank 0's own word where there is one, else what is known."""
    lines = OutboxReader(attempt.outbox).skip_to_end()
    ended_at = datetime.fromtimestamp(_last_sign(attempt), UTC)
    said = read_message(Outcome, attempt.outcome)
    if said is not None:
        return ExitReport(
            outcome=said.outcome,
            step=said.step,
            reason=said.reason,
            message=said.message or f"{said.outcome} at step {said.step}",
            error=said.error,
            last_seq=lines,
            ended_at=ended_at,
        )
    reason, message = _why_lost(attempt)
    return _crashed(attempt, ErrorCard(code=reason, message=message), lines, ended_at)


def _never_began(attempt: AttemptDir) -> ExitReport:
    """Its agent was spawned and ended before it could leave its name: the host cannot run it, and why is in its log."""
    tail = attempt.agent_log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")
    last = next(iter(reversed(tail.strip().splitlines())), "it said nothing")
    message = f"the attempt's agent ended before it began: {last[:500]}"
    card = ErrorCard(code=Reason.LAUNCH_FAILED, message=message, traceback=tail or None)
    return _crashed(attempt, card, 0, datetime.fromtimestamp(attempt.agent_log.stat().st_mtime, UTC))


def _crashed(attempt: AttemptDir, card: ErrorCard, lines: int, ended_at: datetime) -> ExitReport:
    return ExitReport(
        outcome="crashed",
        step=attempt.read_step() or 0,
        reason=Reason(card.code),
        message=card.message,
        error=card,
        last_seq=lines,
        ended_at=ended_at,
    )


def _why_lost(attempt: AttemptDir) -> tuple[Reason, str]:
    try:
        agent = ProcessIdentity.from_json(json.loads(attempt.started.read_bytes())["agent"])
    except (OSError, ValueError, KeyError, TypeError):
        return Reason.AGENT_LOST, "the attempt's agent is gone and left no readable record"
    if agent.boot_id != boot_id():
        return Reason.HOST_RESTARTED, "the host was restarted during the run"
    init = ProcessIdentity.of(1)
    # A namespace's number may be given again; nothing in a container is older than its first process.
    of_before = init is not None and agent.start_ticks < init.start_ticks
    if of_before or agent.pid_namespace != pid_namespace():
        return Reason.HOST_RESTARTED, "the container was restarted during the run"
    return Reason.AGENT_LOST, "the attempt's agent is gone and left no report"


def _last_sign(attempt: AttemptDir) -> float:
    """When the attempt last wrote anything, in seconds since 1970."""
    files = [attempt.outcome, attempt.outbox, attempt.progress, attempt.started]
    return max(file.stat().st_mtime for file in files if file.exists())
