"""The process tree of an attempt on one node: how it is waited for and ended. Standard library only."""

import ctypes
import os
import signal
import subprocess

from trainyard.contract.processes import ProcessIdentity, descendants, signal_all, wait_gone

PR_SET_CHILD_SUBREAPER = 36
KILL_SECONDS = 10.0


def become_subreaper() -> None:
    """Make orphans below this process its children, so that none is lost when torchrun is killed. Raises OSError.

    torchrun starts each rank in its own session: neither its death nor a signal to its process group reaches the ranks.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), "prctl(PR_SET_CHILD_SUBREAPER)")


class ProcessTree:
    """The processes of one attempt on this node: all processes below ``ancestor``.

    ``ancestor`` is the pid of the agent, which is a subreaper. `kill` kills every process below it: a caller with other
    children, such as a test, must pass another pid.
    """

    def __init__(self, torchrun: "subprocess.Popen[bytes]", ancestor: int) -> None:
        self.torchrun = torchrun
        self.ancestor = ancestor
        self.orphans: dict[int, int] = {}

    def torchrun_status(self) -> int | None:
        """Return torchrun's exit code, negative for a signal, or None while it runs. Reaps orphans."""
        status = self.torchrun.poll()
        if status is not None:
            self._reap_orphans()
        return status

    def alive(self) -> list[ProcessIdentity]:
        return descendants(self.ancestor)

    def terminate(self) -> None:
        """Send SIGTERM to all processes: a rank saves and exits after its current step."""
        signal_all(self.alive(), signal.SIGTERM)

    def kill(self) -> bool:
        """Send SIGKILL until no process is left; return whether none is. A stopped process is continued first."""
        for _ in range(3):
            processes = self.alive()
            signal_all(processes, signal.SIGCONT, signal.SIGKILL)
            self.torchrun_status()
            if not wait_gone(processes, KILL_SECONDS) and not self.alive():
                self.torchrun.wait()
                self._reap_orphans()
                return True
        return False

    def _reap_orphans(self) -> None:
        # waitpid(-1) takes the exit status of any child, also from code that waits for that child. So only if all
        # children of this process belong to the attempt, and only after Popen has reaped torchrun itself.
        if self.ancestor != os.getpid():
            return
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self.orphans[pid] = os.waitstatus_to_exitcode(status)
