"""A supervisor on a disk that fails three times: ``python -m tests.faults.failing_disk ATTEMPT read_step|stop|exit``.

It is a process of its own because the agent's `ProcessTree` kills and reaps everything below its process: in
pytest's process that would be what other tests have started. The last line that it prints is a JSON report.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from trainyard.contract.rundir import AttemptDir
from trainyard.contract.status import Desired
from trainyard.worker.agent.supervisor import Supervisor
from trainyard.worker.agent.torchrun import ProcessTree, become_subreaper


def main(path: str, fails: str) -> None:
    become_subreaper()
    attempt = AttemptDir(Path(path))
    torchrun = subprocess.Popen(["/bin/sleep", "100"])
    supervisor = Supervisor.of(attempt, ProcessTree(torchrun, ancestor=os.getpid()))
    calls = fail_three_times(fails)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        if fails == "stop":
            supervisor.uploader.desired = Desired.PAUSE
            running = [supervisor.try_step(0.0)]
            status: int | None = torchrun.wait(60)
        elif fails == "exit":
            running = [supervisor.try_step(0.0)]
            supervisor.processes.kill()
            supervisor.write_report()
            status = torchrun.poll()
        else:
            running = [supervisor.try_step(now) for now in (0.0, 0.1, 0.2, 0.3)]
            status = torchrun.poll()
    report = {
        "running": running,
        "calls": len(calls),
        "printed": printed.getvalue(),
        "status": status,
        "stop_requested_at": supervisor.stop_requested_at,
        "ended": supervisor.processes.kill(),
        "outcome": supervisor.report.outcome if supervisor.report is not None else None,
    }
    print(json.dumps(report), flush=True)


def fail_three_times(name: str) -> list[str]:
    """Make a method or property of `AttemptDir` raise on its first three uses; return the list of its uses."""
    member = vars(AttemptDir)[name]
    intact: Any = member.fget if isinstance(member, property) else member
    calls: list[str] = []

    def broken(attempt: AttemptDir) -> Any:
        calls.append(name)
        if len(calls) < 4:
            raise OSError(28, "No space left on device")
        return intact(attempt)

    setattr(AttemptDir, name, property(broken) if isinstance(member, property) else broken)
    return calls


if __name__ == "__main__":
    main(*sys.argv[1:])
