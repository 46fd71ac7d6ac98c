"""The torchrun process of an attempt on one node: its command line, its start, its process tree.

Standard library only.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
from datetime import UTC, datetime
from typing import Any

from trainyard.contract.locks import FileLock
from trainyard.contract.processes import ProcessIdentity, children, descendants, signal_all, wait_gone
from trainyard.contract.rundir import AttemptDir, RunDir, write_json
from trainyard.worker.agent.rendezvous import (
    LOOPBACK,
    SINGLE_NODE,
    NodeInfo,
    RendezvousEndpoint,
    address_towards,
    interface_of,
)

SECRETS = ("TRAINYARD_ATTEMPT_TOKEN", "TRAINYARD_REPORT_URL", "TRAINYARD_SERVICE_FILE", "TRAINYARD_ATTEMPT_ID")
"""Variables that the agent needs to report, and that the ranks must not have."""

PR_SET_PDEATHSIG = 1

RANK_LOGS = "TRAINYARD_RANK_LOGS"
"""If set, each rank redirects its output to the attempt's ``logs/rank-N.log``."""


def torchrun_command(
    run: RunDir,
    attempt: AttemptDir,
    resources: dict[str, Any],
    node: NodeInfo = SINGLE_NODE,
    endpoint: RendezvousEndpoint | None = None,
) -> list[str]:
    """Return the command line of one attempt on one node; ``endpoint`` is None on a single node."""
    # Not --standalone: then the ranks meet at the host's full name, which may resolve to nothing, such as on a laptop
    # that is off its VPN, or in a container with a name of its own.
    rendezvous = (endpoint or LOOPBACK).torchrun_options(node, f"{run.path.name}-{attempt.number}")
    logs = attempt.torchrun_logs if node.is_leader else attempt.torchrun_logs / f"node-{node.node}"
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *rendezvous,
        f"--nproc-per-node={resources['nproc_per_node']}",
        f"--log-dir={logs}",
        "-m",
        "trainyard.worker",
        str(run.path),
        f"--attempt={attempt.number}",
    ]


def launch_torchrun(
    run: RunDir,
    attempt: AttemptDir,
    alive_lock: FileLock,
    node: NodeInfo = SINGLE_NODE,
    endpoint: RendezvousEndpoint | None = None,
) -> "subprocess.Popen[bytes]":
    """Start torchrun. It inherits the alive lock, which is held from before the first rank until after the last one."""
    resources = json.loads(attempt.spec.read_bytes())["resources"]
    return subprocess.Popen(
        torchrun_command(run, attempt, resources, node, endpoint),
        stdin=subprocess.DEVNULL,
        env=rank_environment(dict(os.environ), endpoint),
        pass_fds=(alive_lock.descriptor,),
        cwd=attempt.path,
        # A cluster signals the agent's process group; only the agent decides what the ranks get.
        start_new_session=node.clustered,
        preexec_fn=set_pdeathsig if node.clustered else None,
    )


def launch_preparation(
    run: RunDir, attempt: AttemptDir, alive_lock: FileLock, node: NodeInfo = SINGLE_NODE
) -> "subprocess.Popen[bytes]":
    """Start the process that prepares a corpus. It inherits the alive lock, as torchrun does."""
    environment = {name: value for name, value in os.environ.items() if name not in SECRETS}
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "trainyard.worker", "prepare", str(run.path), f"--attempt={attempt.number}"],
        stdin=subprocess.DEVNULL,
        env={**environment, "PYTHONUNBUFFERED": "1"},
        pass_fds=(alive_lock.descriptor,),
        cwd=attempt.path,
        start_new_session=node.clustered,
        preexec_fn=set_pdeathsig if node.clustered else None,
    )


def set_pdeathsig() -> None:
    """Make the kernel send SIGTERM to this child when the thread that started it ends: the agent's main thread.

    A cluster that tracks processes by their parents loses the children of a killed agent. On SIGTERM torchrun ends its
    ranks, which save first.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


ALLOCATOR = "expandable_segments:True,pinned_max_cached_size_mb:16"
"""Torch's allocators on a GPU. Without expandable segments, evaluations and the experts' slots leave the GPU's memory
in pieces that fit nothing. Pinned host memory is rounded up to a power of two, and kept when it is freed: above 16 MB,
which is more than a micro-batch, the buffers of a save take what they need and give it back.
"""
# Not pinned_max_round_threshold_mb: it caches blocks of any size, and torch 2.13 may reuse one that is too small.


def rank_environment(environment: dict[str, str], endpoint: RendezvousEndpoint | None = None) -> dict[str, str]:
    """Return the ranks' environment: the agent's without its secrets.

    It makes Gloo use the interface on the route to the first node, on a single node the loopback interface. By default
    Gloo uses the address of the node's own name, which may not resolve, or be reachable on the node alone.
    """
    inherited = {name: value for name, value in environment.items() if name not in SECRETS}
    interface = interface_of(address_towards((endpoint or LOOPBACK).host))
    gloo = {"GLOO_SOCKET_IFNAME": interface} if interface is not None else {}
    # It must be set before the process starts. A choice of the user is kept, under the old name too.
    allocator = {} if "PYTORCH_CUDA_ALLOC_CONF" in inherited else {"PYTORCH_ALLOC_CONF": ALLOCATOR}
    return {**gloo, **allocator, **inherited, RANK_LOGS: "1", "PYTHONUNBUFFERED": "1"}


def write_started(attempt: AttemptDir) -> None:
    """Record this agent's identity, so that a restarted service finds it again."""
    identity = ProcessIdentity.of(os.getpid())
    assert identity is not None
    record = {"agent": identity.to_json(), "started_at": datetime.now(UTC).isoformat()}
    write_json(attempt.started, record)


PR_SET_CHILD_SUBREAPER, PR_GET_CHILD_SUBREAPER = 36, 37
KILL_SECONDS = 10.0


def become_subreaper() -> None:
    """Make orphans below this process its children, so that none is lost when torchrun is killed. Raises OSError.

    torchrun starts each rank in its own session: neither its death nor a signal to its process group reaches the ranks.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), "prctl(PR_SET_CHILD_SUBREAPER)")


def is_subreaper() -> bool:
    """Return whether this process has called `become_subreaper`. A child does not inherit it."""
    flag = ctypes.c_int()
    ctypes.CDLL(None).prctl(PR_GET_CHILD_SUBREAPER, ctypes.byref(flag), 0, 0, 0)
    return bool(flag.value)


class ProcessTree:
    """The processes of one attempt on this node: all processes below ``ancestor``.

    ``ancestor`` is the pid of the agent, which is a subreaper. `kill` kills every process below it, so a process may
    only pass itself after `become_subreaper`: a process with other children, such as a test, never calls that. Raises
    ValueError otherwise. ``has_ranks`` False: ``torchrun`` is the process that does the work itself.
    """

    def __init__(self, torchrun: "subprocess.Popen[bytes]", ancestor: int, has_ranks: bool = True) -> None:
        if ancestor == os.getpid() and not is_subreaper():
            raise ValueError("only a subreaper may end all processes below it: call become_subreaper first")
        self.torchrun = torchrun
        self.ancestor = ancestor
        self.has_ranks = has_ranks
        self.orphans: dict[int, int] = {}

    def torchrun_status(self) -> int | None:
        """Return torchrun's exit code, negative for a signal, or None while it runs. Reaps orphans."""
        status = self.torchrun.poll()
        if status is not None:
            self._reap_orphans()
        return status

    def alive(self) -> list[ProcessIdentity]:
        return descendants(self.ancestor)

    def ranks(self) -> list[ProcessIdentity]:
        """Return the running ranks: torchrun's own children, without the processes that a rank has started."""
        if self.has_ranks:
            return children(self.torchrun.pid)
        process = ProcessIdentity.of(self.torchrun.pid)
        return [process] if process is not None else []

    def terminate(self) -> None:
        """Send SIGTERM to torchrun and the ranks: a rank saves and exits after its current step.

        Not to the processes that a rank has started: it must not lose, for example, the compiler that it waits for.
        """
        torchrun = ProcessIdentity.of(self.torchrun.pid)
        others = self.ranks() if self.has_ranks else []
        signal_all([*([torchrun] if torchrun is not None else []), *others], signal.SIGTERM)

    def dump_stacks(self) -> None:
        """Make the ranks print their stacks into their logs. A rank that does not catch SIGUSR2 yet is left out."""
        signal_all([rank for rank in self.ranks() if rank.catches(signal.SIGUSR2)], signal.SIGUSR2)

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
