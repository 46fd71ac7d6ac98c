"""The real service with three things changed: which agent it starts, how long it waits, and where it dies.

``python -m tests.faults.forked_service`` reads one JSON object a line, {"home", "environment", ...}, and answers
{"pid"}. Each line makes a service in a process of its own, forked from one that has imported everything: so a
thousand deaths do not take an hour. `service.__main__.main` runs there from its first line to its last.
"""

import json
import os
import signal
import sys
import threading
from datetime import datetime, timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import trainyard.service.__main__
from tests.faults.tracing import at_line
from trainyard.contract.failpoints import marked_code
from trainyard.service.clock import utc_now
from trainyard.service.launch.environment import WORKER_AGENT
from trainyard.service.scheduler.loop import Scheduler
from trainyard.service.timing import Timing

DIED_AT_FAILPOINT = 77
FAKE_AGENT = (sys.executable, str(Path(__file__).with_name("fake_agent.py")))
AREAS = {
    "slurm": ("launch.scheduler", "launch.slurm"),
    "launch": ("launch.scheduler", "launch.local"),
}
"""The failpoints at which a service can die, at the n-th line that it runs there."""


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
    _arm(wanted)
    agent = tuple(wanted.get("agent", WORKER_AGENT if wanted.get("real_ranks") else FAKE_AGENT))
    arguments = [f"--home={home}", "--port=0", *wanted.get("arguments", [])]
    code = 1
    try:
        # Fake ranks read no corpus.
        prepares = bool(wanted.get("real_ranks"))
        code = trainyard.service.__main__.main(arguments, agent, _timing(wanted), prepares)
    finally:
        sys.stdout.flush()
        os._exit(code)


def _timing(wanted: dict[str, Any]) -> Timing:
    usual, scale, lease_scale = Timing(), float(wanted.get("scale", 1.0)), float(wanted.get("lease_scale", 1.0))
    return Timing(
        backoff_seconds=tuple(seconds * scale for seconds in usual.backoff_seconds),
        setback_seconds=tuple(seconds * scale for seconds in usual.setback_seconds),
        quiet=usual.quiet * scale,
        kill_grace=usual.kill_grace * scale,
        lease_seconds=usual.lease_seconds * lease_scale,
        renew_seconds=usual.renew_seconds * lease_scale,
    )


def _arm(wanted: dict[str, Any]) -> None:
    if wanted.get("clock"):
        _let_the_clock_be_set(Path(wanted["home"]) / "clock")
    for name, fate in (("die_at", _die), ("stop_at", _stop)):
        if name in wanted:
            where, line = wanted[name]
            threading.settrace(at_line(marked_code(*AREAS[where]), int(line), fate))


def _let_the_clock_be_set(file: Path) -> None:
    """Make the service's wall clock wrong by the seconds in ``file``, which is read each time."""
    right = utc_now

    def wrong() -> datetime:
        return right() + timedelta(seconds=float(file.read_text()) if file.exists() else 0.0)

    for module in list(sys.modules.values()):
        for name in [name for name, value in getattr(module, "__dict__", {}).items() if value is right]:
            setattr(module, name, wrong)
    defaults = Scheduler.__init__.__defaults__ or ()
    Scheduler.__init__.__defaults__ = tuple(wrong if value is right else value for value in defaults)


def _die(where: str) -> None:
    """Exit at once, like SIGKILL."""
    print(f"died at {where}", file=sys.stderr, flush=True)
    os._exit(DIED_AT_FAILPOINT)


def _stop(where: str) -> None:
    """Stop all threads until SIGCONT."""
    print(f"stopped at {where}", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)


if __name__ == "__main__":
    main()
