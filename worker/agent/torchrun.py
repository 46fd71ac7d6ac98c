"""How torchrun is started: its command line and its environment. Standard library only."""

import ctypes
import json
import os
import signal
import subprocess
import sys
from datetime import UTC, datetime
from typing import Any

from trainyard.contract.locks import FileLock
from trainyard.contract.processes import ProcessIdentity
from trainyard.contract.rundir import AttemptDir, RunDir, write_json
from trainyard.worker.agent.rendezvous import (
    SINGLE_NODE,
    NodeInfo,
    RendezvousEndpoint,
    address_towards,
    interface_of,
)

SECRETS = ("TRAINYARD_ATTEMPT_TOKEN", "TRAINYARD_REPORT_URL", "TRAINYARD_SERVICE_FILE", "TRAINYARD_ATTEMPT_ID")
"""What the agent needs to report, and the training process does not."""

PR_SET_PDEATHSIG = 1

RANK_LOGS = "TRAINYARD_RANK_LOGS"
"""Set: each rank writes what it prints to the attempt's ``logs/rank-N.log``."""


def torchrun_command(
    run: RunDir,
    attempt: AttemptDir,
    resources: dict[str, Any],
    place: NodeInfo = SINGLE_NODE,
    meeting: RendezvousEndpoint | None = None,
) -> list[str]:
    """The command line of one attempt on one node; ``meeting``: where those of several nodes meet."""
    where = (
        ["--standalone"] if meeting is None else meeting.torchrun_options(place, f"{run.path.name}-{attempt.number}")
    )
    logs = attempt.torchrun_logs if place.is_leader else attempt.torchrun_logs / f"node-{place.node}"
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *where,
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
    place: NodeInfo = SINGLE_NODE,
    meeting: RendezvousEndpoint | None = None,
) -> "subprocess.Popen[bytes]":
    """Start torchrun; it inherits the alive lock, so the lock is held from before the first rank to after the last."""
    resources = json.loads(attempt.spec.read_bytes())["resources"]
    return subprocess.Popen(
        torchrun_command(run, attempt, resources, place, meeting),
        stdin=subprocess.DEVNULL,
        env=rank_environment(dict(os.environ), meeting),
        pass_fds=(alive_lock.descriptor,),
        cwd=attempt.path,
        # A cluster signals the agent's process group. What it means by that is the agent's to tell the ranks.
        start_new_session=place.clustered,
        preexec_fn=set_pdeathsig if place.clustered else None,
    )


def set_pdeathsig() -> None:
    """Have this child told to end (SIGTERM) when the thread that started it does: the agent's main one.

    A cluster that follows processes by their parents loses those whose agent was killed. torchrun has its ranks save.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def rank_environment(environment: dict[str, str], meeting: RendezvousEndpoint | None = None) -> dict[str, str]:
    """The ranks' environment: the agent's, less what only the agent may know.

    Of several nodes each is reached at the address by which it reaches the first one: Gloo would take that which the
    node's name leads to, and that may lead nowhere, or to the node alone.
    """
    kept = {name: value for name, value in environment.items() if name not in SECRETS}
    interface = interface_of(address_towards(meeting.host)) if meeting is not None else None
    chosen = {"GLOO_SOCKET_IFNAME": interface} if interface is not None else {}
    return {**chosen, **kept, RANK_LOGS: "1", "PYTHONUNBUFFERED": "1"}


def write_started(attempt: AttemptDir) -> None:
    """Leave this agent's identity for a service that has to find it again."""
    identity = ProcessIdentity.of(os.getpid())
    assert identity is not None
    record = {"agent": identity.to_json(), "started_at": datetime.now(UTC).isoformat()}
    write_json(attempt.started, record)
