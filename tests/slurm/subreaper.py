"""Parent of a test cluster's daemons: once its own parent has ended, in any way, it kills everything of the cluster.

    python -m tests.slurm.subreaper     reads one JSON array a line, a command to start; EOF on stdin: kill everything

Slurm's daemons and steps detach from their parent. As child subreaper this process becomes their parent again, so that
a killed test run leaves neither daemons nor jobs. Standard library only.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from types import FrameType

from trainyard.contract.processes import descendants, signal_all, wait_gone
from trainyard.worker.agent.torchrun import become_subreaper


def main() -> None:
    """Start the requested commands until stdin is closed, then kill everything."""
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
