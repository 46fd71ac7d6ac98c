"""Parent of a test cluster's daemons: once its own parent is gone, however it went, nothing of the cluster is left.

    python -m tests.slurm.subreaper     reads one JSON array a line, a command to start; EOF on stdin: end everything

Slurm's daemons and steps leave their parent behind on purpose. As child subreaper this process gets them all back, so
that a test run that was killed leaves neither daemons nor jobs. Standard library only.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from types import FrameType

from trainyard.contract.processes import descendants, signal_all, wait_gone
from trainyard.worker.agent.processes import become_subreaper


def main() -> None:
    """Start what is asked for until nobody can ask any more."""
    become_subreaper()
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, _reap)
    for line in sys.stdin:
        log, command = json.loads(line)
        with open(log, "ab") as out:
            started = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        print(started.pid, flush=True)
    while found := descendants(os.getpid()):
        signal_all(found, signal.SIGCONT, signal.SIGKILL)
        wait_gone(found, 5.0)


def _reap(_signum: int, _frame: FrameType | None) -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


if __name__ == "__main__":
    main()
