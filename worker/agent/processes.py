"""torchrun and everything below it: how it is waited for and how it is ended. Standard library only."""

import ctypes
import os
import signal
import subprocess

from trainyard.contract.processes import (
    ProcessIdentity,
    descendants,
    signal_all,
    wait_gone,
)

PR_SET_CHILD_SUBREAPER = 36
END_SECONDS = 10.0


def become_subreaper() -> None:
    """Make every orphan below this process its own child, so that none is lost when torchrun is killed.

    torchrun starts each rank in a session of its own: neither its death nor a signal to its process group reaches them.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), "prctl(PR_SET_CHILD_SUBREAPER)")


class ProcessTree:
    """One attempt's processes on this node, torchrun first: every process below ``ancestor``, and no other.

    ``ancestor`` is the pid of the agent, which is a subreaper. It is passed in because `end` kills all that it finds:
    a caller with children of its own, such as a test, must give another one.
    """

    def __init__(self, torchrun: "subprocess.Popen[bytes]", ancestor: int) -> None:
        self.torchrun = torchrun
        self.ancestor = ancestor
        self.orphans: dict[int, int] = {}

    def torchrun_status(self) -> int | None:
        """torchrun's exit code, negative for a signal, or None while it lives. Orphans are reaped on the way."""
        status = self.torchrun.poll()
        if status is not None:
            self._reap_orphans()
        return status

    def alive(self) -> list[ProcessIdentity]:
        """Every living process of the attempt on this node."""
        return descendants(self.ancestor)

    def terminate(self) -> None:
        """SIGTERM to all: a rank saves and ends at its next step."""
        signal_all(self.alive(), signal.SIGTERM)

    def kill(self) -> bool:
        """SIGKILL to all until none is left; True when none is. A stopped process is continued first."""
        for _ in range(3):
            found = self.alive()
            signal_all(found, signal.SIGCONT, signal.SIGKILL)
            self.torchrun_status()
            if not wait_gone(found, END_SECONDS) and not self.alive():
                self.torchrun.wait()
                self._reap_orphans()
                return True
        return False

    def _reap_orphans(self) -> None:
        # Waiting for "any child" takes the status away from whoever waits for that child: so only if all children of
        # this process are the attempt's, and only after torchrun itself is reaped, for Popen waits for that one.
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
