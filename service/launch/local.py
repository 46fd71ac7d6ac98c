"""The launcher for this host: each attempt gets a detached agent, which outlives the service."""

import contextlib
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainyard.contract.failpoints import failpoint
from trainyard.contract.locks import is_held
from trainyard.contract.messages import ExitReport, RunSettings, read_message
from trainyard.contract.processes import (
    LEASED_DEVICES,
    MARKER,
    ProcessIdentity,
    boot_id,
    find_by_marker,
    find_by_variable,
    live_markers,
    pid_namespace,
    signal_all,
    variable_of,
    wait_gone,
)
from trainyard.contract.rundir import AttemptDir
from trainyard.contract.spec import JobSpec, Timeouts
from trainyard.contract.status import Reason
from trainyard.service.launch import post_mortem
from trainyard.service.launch.base import AttemptRef, AttemptState, AttemptStatus, Launch, LaunchRefused
from trainyard.service.launch.environment import SERVICE_FILE_VARIABLE, WORKER_AGENT, WorkerEnvironment
from trainyard.service.launch.files import AttemptFiles

KILL_SIGNALS = (signal.SIGCONT, signal.SIGKILL)
KILL_SECONDS = 5.0
STOP_POLL_SECONDS = 0.1
VISIBLE_SECONDS = 2.0  # milliseconds are enough; some kernels show no environment at all
REPORT_SECONDS = 30.0  # for the report of an attempt after its last process has ended
# Only the agent has the token to report with. It removes it from the environment of its children.
AGENT_TOKEN_VARIABLE = "TRAINYARD_ATTEMPT_TOKEN"  # noqa: S105 - the variable that holds it

log = logging.getLogger("trainyard")


class LocalLauncher:
    """A launcher that relies on the kernel's locks, on marked processes, and on the attempt's files."""

    def __init__(
        self,
        home: Path,
        corpus_cache: Path,
        data_roots: Sequence[Path] = (),
        save_roots: Sequence[Path] = (),
        agent: tuple[str, ...] = WORKER_AGENT,
    ) -> None:
        self._agent = agent
        self._environment = WorkerEnvironment(home, corpus_cache, data_roots, save_roots)
        self._files = AttemptFiles(home, corpus_cache)

    @failpoint("launch.local.start")
    def start(self, launch: Launch) -> None:
        """Write the spec and start the agent, detached. A second call for the same attempt does nothing."""
        attempt = self._files.attempt(launch.name)
        if self.find(launch.name).state is not AttemptState.ABSENT or attempt.closed.exists():
            return
        try:
            self._files.write(launch)
            pid = self._spawn(launch, attempt)
        except OSError as error:
            raise LaunchRefused(f"the attempt could not be started: {error}") from error
        # The agent runs from here on, so an error is no LaunchRefused, which means that there is no process.
        _wait_until_visible(pid, str(launch.name))
        threading.Thread(target=_reap, args=(pid,), daemon=True).start()
        log.info("the agent was started", extra={**launch.name.fields, "pid": pid})

    @failpoint("launch.local.spawn")
    def _spawn(self, launch: Launch, attempt: AttemptDir) -> int:
        command = [*self._agent, str(attempt.path.parent), f"--attempt={launch.name.number}"]
        append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        return os.posix_spawn(
            command[0],
            command,
            # NVML, which numbers the leased devices, uses the PCI order. CUDA alone would put the fastest card first.
            {
                **self._environment.of(launch),
                "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
                "CUDA_VISIBLE_DEVICES": launch.cuda_visible,
                LEASED_DEVICES: ",".join(launch.devices),
            },
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, str(attempt.agent_log), append, 0o644),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
            # With a pipe or a shared session the run would end with the service or the terminal.
            setsid=True,
        )

    def find(self, name: AttemptRef) -> AttemptStatus:
        """Return the attempt's state from its files and the process table."""
        # The order matters: exit.json is written only after every process has ended.
        attempt = self._files.attempt(name)
        report = read_message(ExitReport, attempt.exit)
        if report is not None:
            return AttemptStatus(AttemptState.ENDED, report)
        processes = find_by_marker(str(name))
        if any(_is_agent(process) for process in processes):
            return AttemptStatus(AttemptState.ALIVE)
        if processes or self._ranks_hold_lock(name):
            return AttemptStatus(AttemptState.ORPHANED)
        # Read again: an agent that ended between the two checks has written its report by now.
        report = read_message(ExitReport, attempt.exit)
        if report is not None:
            return AttemptStatus(AttemptState.ENDED, report)
        if attempt.started.exists():
            return AttemptStatus(AttemptState.ENDED, _inferred_report(attempt))
        if attempt.agent_log.exists() and attempt.closed.exists():
            return AttemptStatus(AttemptState.ENDED, post_mortem.not_started_report(attempt))
        return AttemptStatus(AttemptState.ABSENT)

    def find_alive(self, names: Sequence[AttemptRef]) -> set[AttemptRef]:
        """Return the attempts whose agent is alive and has not written its report."""
        agents = live_markers(with_variable=AGENT_TOKEN_VARIABLE)
        return {name for name in names if str(name) in agents and not self._files.attempt(name).exit.exists()}

    def _ranks_hold_lock(self, name: AttemptRef) -> bool:
        # Processes that are not visible from here, as in another container, still hold the kernel's lock.
        run = self._files.run(name)
        try:
            current = run.current.read_text().strip()
        except FileNotFoundError:
            return False
        return current == str(name.number) and is_held(run.alive_lock)

    def stop(self, name: AttemptRef) -> None:
        self._files.request_stop(name)

    def save_and_stop_all(self) -> list[AttemptRef]:
        """Make every attempt of this home on this host save and end, and wait for it. Return those that did not end.

        Their agents get SIGTERM, as when the host shuts down, and enforce the timeouts of the spec. So the jobs are
        interrupted and restarted automatically, also if this service ends before it has their exit reports.
        """
        asked: dict[AttemptRef, float] = {}
        while agents := self._agents():
            now = time.monotonic()
            for name, process in agents.items():
                if name not in asked:
                    log.info("asked to save and stop", extra=name.fields)
                    asked[name] = now + self._seconds_to_stop(name)
                    process.send(signal.SIGTERM)
            if all(asked[name] < now for name in agents):
                return list(agents)
            time.sleep(STOP_POLL_SECONDS)
        return []

    def _agents(self) -> dict[AttemptRef, ProcessIdentity]:
        found = {}
        for process in find_by_variable(SERVICE_FILE_VARIABLE, str(self._environment.service_file)):
            job_id, _, number = (process.variable(MARKER) or "").partition("/")
            if _is_agent(process) and number.isdecimal():
                found[AttemptRef(job_id, int(number))] = process
        return found

    def _seconds_to_stop(self, name: AttemptRef) -> float:
        try:
            timeouts = JobSpec.model_validate_json(self._files.attempt(name).spec.read_bytes()).resources.timeouts
        except (OSError, ValueError):
            timeouts = Timeouts()
        return timeouts.stop + timeouts.term + REPORT_SECONDS

    def save(self, name: AttemptRef) -> None:
        self._files.request_save(name)

    def kill(self, name: AttemptRef) -> None:
        """SIGKILL every process with the attempt's mark until none is left, and let none start afterwards."""
        # The attempt is closed first. An agent becomes visible before it checks for the closed file, so either the
        # agent finds the file or the loop below finds the agent.
        with contextlib.suppress(OSError):  # a full disk must not prevent the kill
            self._files.close(name)
        for _ in range(3):
            processes = find_by_marker(str(name))
            if not processes:
                break
            log.warning("killing the processes of an attempt", extra={**name.fields, "processes": len(processes)})
            signal_all(processes, *KILL_SIGNALS)
            wait_gone(processes, KILL_SECONDS)

    def write_settings(self, name: AttemptRef, settings: RunSettings) -> None:
        self._files.write_settings(name, settings)

    def unacked_lines(self, name: AttemptRef, after_seq: int, limit: int) -> list[dict[str, Any]]:
        return self._files.unacked_lines(name, after_seq, limit)


def _wait_until_visible(pid: int, mark: str) -> None:
    """Return once ``pid`` has its mark in the process table, or has ended.

    The kernel lets a spawn return before the new program's environment can be read. Until then `find` takes the
    attempt for one that was never launched, and a second `start` would launch it again.
    """
    deadline = time.monotonic() + VISIBLE_SECONDS
    while variable_of(pid, MARKER) != mark and ProcessIdentity.of(pid) is not None and time.monotonic() < deadline:
        time.sleep(0.001)


def _reap(pid: int) -> None:
    # Without this, the agent would stay a zombie: the service may never inspect the attempt again after its report.
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)


def _is_agent(process: ProcessIdentity) -> bool:
    return process.variable(AGENT_TOKEN_VARIABLE) is not None


def _inferred_report(attempt: AttemptDir) -> ExitReport:
    return post_mortem.report_from_outcome(attempt) or post_mortem.lost_report(attempt, *_why_lost(attempt))


def _why_lost(attempt: AttemptDir) -> tuple[Reason, str]:
    try:
        agent = ProcessIdentity.from_json(json.loads(attempt.started.read_bytes())["agent"])
    except (OSError, ValueError, KeyError, TypeError):
        return Reason.AGENT_LOST, "the attempt's agent is gone and left no readable record"
    if agent.boot_id != boot_id():
        return Reason.HOST_RESTARTED, "the host was restarted during the run"
    init = ProcessIdentity.of(1)
    # A namespace's number may be reused, but no process in a container is older than its first one.
    of_before = init is not None and agent.start_ticks < init.start_ticks
    if of_before or agent.pid_namespace != pid_namespace():
        return Reason.HOST_RESTARTED, "the container was restarted during the run"
    return Reason.AGENT_LOST, "the attempt's agent is gone and left no report"
