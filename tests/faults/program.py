"""The real service with three things changed: which agent it starts, how long it waits, and where it dies.

    python -m tests.faults.program      reads one JSON object a line, {"home", "environment", ...}, answers {"pid"}

Each line makes a service in a process of its own: forked from one that has imported everything, so that a thousand
deaths take no hour. What a test wants to see at work is `service.__main__.main`, from its first line to its last.
"""

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import service.__main__
from service.jobs import rules
from service.launch import commands
from service.launch.environment import WORKER_AGENT
from service.launch.local import LocalLauncher
from service.launch.slurm import SlurmLauncher
from service.scheduler import apply, lease, plan
from service.scheduler.apply import Applier
from service.scheduler.loop import Scheduler

DIED_AT_FAILPOINT = 77
FAKE_AGENT = (sys.executable, str(Path(__file__).with_name("driver.py")))
PATHS = {
    "slurm": (Applier._start, Applier._claim, apply._claimed, SlurmLauncher.start, commands.submit),
    "launch": (Applier._start, Applier._claim, apply._claimed, LocalLauncher.start, LocalLauncher._spawn),
}
"""The functions in which a service may be told to die, at the n-th line that it runs there."""


def main() -> None:
    """Fork a service for each line, until there are no more lines."""
    signal.signal(signal.SIGCHLD, _reap)
    while line := _next_line():
        wanted = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _become_service(wanted)
        print(json.dumps({"pid": pid}), flush=True)


def _next_line() -> bytes:
    # Unbuffered: a child must not find in its copy of a buffer what is meant for its parent.
    found = b""
    while not found.endswith(b"\n"):
        got = os.read(0, 1)
        if not got:
            return b""
        found += got
    return found


def _reap(_signum: int, _frame: FrameType | None) -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def _become_service(wanted: dict[str, Any]) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    home = Path(wanted["home"])
    log = os.open(home / "service.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(wanted.get("environment", {}))
    _change(wanted)
    code = 1
    try:
        code = service.__main__.main([f"--home={home}", "--port=0", *wanted.get("arguments", [])])
    finally:
        sys.stdout.flush()
        os._exit(code)


def _change(wanted: dict[str, Any]) -> None:
    agent = tuple(wanted.get("agent", WORKER_AGENT if wanted.get("real_ranks") else FAKE_AGENT))
    service.__main__.WORKER_AGENT = agent  # type: ignore[attr-defined]
    scale = float(wanted.get("scale", 1.0))
    first, second, third = rules.BACKOFF_SECONDS
    rules.BACKOFF_SECONDS = first * scale, second * scale, third * scale
    rules.SETBACK_SECONDS = tuple(seconds * scale for seconds in rules.SETBACK_SECONDS)
    plan.QUIET = plan.QUIET * scale
    plan.KILL_GRACE = plan.KILL_GRACE * scale
    lease.LEASE_SECONDS *= float(wanted.get("lease_scale", 1.0))
    lease.RENEW_SECONDS *= float(wanted.get("lease_scale", 1.0))
    if wanted.get("clock"):
        _let_the_clock_be_set(Path(wanted["home"]) / "clock")
    for name, fate in (("die_at", _die), ("stop_at", _stop)):
        if name in wanted:
            where, line = wanted[name]
            threading.settrace(at_line({function.__code__ for function in PATHS[where]}, int(line), fate))


def _let_the_clock_be_set(file: Path) -> None:
    """The service's wall clock is off by as many seconds as stand in ``file``, from one look to the next."""
    right = apply.utc_now

    def wrong() -> datetime:
        return right() + timedelta(seconds=float(file.read_text()) if file.exists() else 0.0)

    for module in list(sys.modules.values()):
        if getattr(module, "utc_now", None) is right:
            module.utc_now = wrong  # type: ignore[attr-defined]
    defaults = Scheduler.__init__.__defaults__ or ()
    Scheduler.__init__.__defaults__ = tuple(wrong if value is right else value for value in defaults)


def _die(where: str) -> None:
    """As SIGKILL would."""
    print(f"died at {where}", file=sys.stderr, flush=True)
    os._exit(DIED_AT_FAILPOINT)


def _stop(where: str) -> None:
    """All threads, until somebody sends SIGCONT."""
    print(f"stopped at {where}", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)


def at_line(codes: set[CodeType], number: int, fate: Callable[[str], None]) -> Callable[[FrameType, str, Any], Any]:
    """A trace function that calls ``fate`` before the ``number``-th line that is run in ``codes``."""
    left = number

    def local(frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal left
        if event == "line":
            left -= 1
            if left == 0:
                fate(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
        return local

    def entered(frame: FrameType, _event: str, _argument: Any) -> Any:
        return local if frame.f_code in codes else None

    return entered


if __name__ == "__main__":
    main()
