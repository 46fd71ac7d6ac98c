"""A real Slurm cluster of two nodes on this machine, with its own keys, ports and state; ready in a second."""

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.faults.service_home import ROOT, members, until
from trainyard.contract.processes import PROC, ProcessIdentity, all_pids

NODES = ("node1", "node2")
SECONDS = 120.0
"""How long a daemon may take for anything on a busy machine."""
PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scancel", "squeue", "scontrol")
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"

CONF = """\
ClusterName=trainyard-test
SlurmctldHost={host}({controller})
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={dir}/munge.socket,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool-%n
SlurmctldPidFile={dir}/slurmctld.pid
SlurmdPidFile={dir}/slurmd-%n.pid
SlurmctldLogFile={dir}/slurmctld.log
SlurmdLogFile={dir}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=10
SlurmctldTimeout=10
MessageTimeout=5
KillWait=10
InactiveLimit=0
JobRequeue=1
MinJobAge=300
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
GresTypes=gpu
{nodes}
PartitionName=train Nodes=node1,node2 Default=YES MaxTime=INFINITE State=UP
PartitionName=spare Nodes=node2 MaxTime=INFINITE State=UP
PartitionName=short Nodes=node1,node2 MaxTime=2 DefaultTime=2 State=UP
"""
NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr={address} Port={port} CPUs=2 RealMemory=4000 Gres=gpu:2 State=UNKNOWN"
)


def skip_reason() -> str | None:
    """Return why no cluster can run here, or None."""
    missing = [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]
    if missing:
        return f"Slurm is not installed: {', '.join(missing)} not found"
    return None if os.geteuid() == 0 else "a test cluster of Slurm needs root"


class Cluster:
    """Two `slurmd` on one host as two nodes. ``environment``: what Slurm's commands need to find the cluster."""

    controller = "127.0.0.1"

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = {"SLURM_CONF": str(directory / "slurm.conf")}
        self._subreaper = subprocess.Popen(
            [sys.executable, "-m", "tests.slurm.subreaper"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **self.environment, "PATH": PATH},
        )

    def start(self) -> None:
        """Write the configuration, start all daemons, and return once both nodes are idle."""
        self._configure()
        self.start_munge()
        self.start_controller()
        for node in NODES:
            self.start_node(node)
        until(lambda: self.states() == dict.fromkeys(NODES, "IDLE"), SECONDS, f"idle nodes; {self.logs()}")

    def stop(self) -> None:
        """Stop everything: the subreaper does so once its input is closed."""
        assert self._subreaper.stdin is not None
        assert self._subreaper.stdout is not None
        self._subreaper.stdin.close()
        self._subreaper.stdout.close()
        self._subreaper.wait(SECONDS)

    def _configure(self) -> None:
        directory = self.directory
        (directory / "state").mkdir()
        port, *ports = _free_ports(3)
        nodes = "\n".join(self.node_line(name, port) for name, port in zip(NODES, ports, strict=True))
        addresses = {"host": socket.gethostname(), "controller": self.controller, "controller_port": port}
        text = CONF.format(**addresses, dir=directory, nodes=nodes)
        (directory / "slurm.conf").write_text(text)
        (directory / "cgroup.conf").write_text("CgroupAutomount=no\n")
        (directory / "gres.conf").write_text(f"NodeName=node[1-2] Name=gpu File={directory}/fakegpu[0-1]\n")
        for number in range(2):
            # Like /dev/null: enough to be leased. What is leased is tested, not that it is kept from others.
            os.mknod(directory / f"fakegpu{number}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))

    def node_line(self, name: str, port: int) -> str:
        """Return the node's line in slurm.conf."""
        return NODE.format(name=name, host=socket.gethostname(), address="127.0.0.1", port=port)

    def start_munge(self) -> None:
        """Start munged, with its previous key if it had one."""
        directory = self.directory
        key = directory / "munge.key"
        if not key.exists():
            key.write_bytes(os.urandom(128))
            key.chmod(0o600)
        files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munge.pid", "log-file": "munge.log"}
        options = [f"--{name}={directory / file}" for name, file in {**files, "seed-file": "munge.seed"}.items()]
        (directory / "munge.socket").unlink(missing_ok=True)
        self.spawn("munge.out", "munged", "--foreground", "--force", "--num-threads=2", *options)
        until((directory / "munge.socket").exists, SECONDS, "munged listens")

    def start_controller(self) -> None:
        self.spawn("slurmctld.out", "slurmctld", "-D", "-f", self.environment["SLURM_CONF"])

    def start_node(self, name: str) -> None:
        self.spawn(f"{name}.out", *self.node_command(name))

    def node_command(self, name: str) -> list[str]:
        """Return the command of the node's slurmd."""
        return ["slurmd", "-D", "-f", self.environment["SLURM_CONF"], "-N", name]

    def spawn(self, log: str, program: str, *arguments: str) -> int:
        assert self._subreaper.stdin is not None
        assert self._subreaper.stdout is not None
        executable = shutil.which(program, path=PATH)
        request = [str(self.directory / log), [executable, *arguments]]
        self._subreaper.stdin.write(json.dumps(request).encode() + b"\n")
        self._subreaper.stdin.flush()
        return int(self._subreaper.stdout.readline())

    def run(self, *command: str, seconds: float = 60.0) -> str:
        """Return the output of one of Slurm's commands."""
        environment = {**os.environ, **self.environment, "PATH": PATH}
        process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
        assert process.returncode == 0, f"{command}: {process.stderr}"
        return process.stdout

    def states(self) -> dict[str, str]:
        """Return node -> state, from `scontrol`."""
        try:
            lines = self.run("scontrol", "show", "node", "-o").splitlines()
        except AssertionError:
            return {}
        fields = [dict(part.split("=", 1) for part in line.split() if "=" in part) for line in lines]
        return {item["NodeName"]: item["State"] for item in fields}

    def jobs(self) -> list[dict[str, Any]]:
        """Return every job that Slurm still knows."""
        jobs: list[dict[str, Any]] = json.loads(self.run("squeue", "--json", "-t", "all"))["jobs"]
        return jobs

    def drain(self, node: str) -> None:
        self.run("scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=test")

    def undrain(self, node: str) -> None:
        self.run("scontrol", "update", f"NodeName={node}", "State=RESUME")

    def controllers(self) -> list[ProcessIdentity]:
        return self._processes(lambda words: words[0].endswith("slurmctld"))

    def munged_processes(self) -> list[ProcessIdentity]:
        own = f"--socket={self.directory}/munge.socket"
        processes = [ProcessIdentity.of(pid) for pid in all_pids() if own in _command(pid)]
        return [process for process in processes if process is not None]

    def daemons(self, node: str) -> list[ProcessIdentity]:
        return self._processes(lambda words: words[0].endswith("slurmd") and words[-1] == node)

    def steps(self, node: str) -> list[ProcessIdentity]:
        """The slurmstepd processes of the node. They overwrite their own environment; their children have it."""
        parents = {process: parent_of(process.pid) for pid in all_pids() if (process := ProcessIdentity.of(pid))}
        own = {
            parent
            for process, parent in parents.items()
            if process.variable("SLURMD_NODENAME") == node
            and process.variable("SLURM_CONF") == self.environment["SLURM_CONF"]
        }
        return [item for item in parents if item.pid in own and "slurmstepd" in " ".join(_command(item.pid))]

    def _processes(self, matches: Any) -> list[ProcessIdentity]:
        processes = []
        for pid in all_pids():
            words = _command(pid)
            own = self.environment["SLURM_CONF"] in words
            if words and own and matches(words) and (identity := ProcessIdentity.of(pid)):
                processes.append(identity)
        return processes

    def wait_until_saved(self, number: object) -> None:
        """Return once the controller has saved the job's state, which it does only every few seconds."""
        began = time.time()
        self.run("scontrol", "update", f"JobId={number}", "AdminComment=remember")
        until(lambda: (self.directory / "state" / "job_state").stat().st_mtime > began, SECONDS, "it is written down")

    def kill(self, processes: list[ProcessIdentity]) -> None:
        """SIGKILL, and return once they have ended."""
        for process in processes:
            process.send(signal.SIGKILL)
        until(lambda: not any(process.alive() for process in processes), SECONDS, "they are gone")

    def restore(self) -> None:
        """After any test: a controller, two idle nodes and no job; if necessary with a new cluster."""
        self._kill_strays()
        try:
            self._repair()
        except (AssertionError, subprocess.TimeoutExpired) as error:
            print(f"the cluster is recreated: {error}")
            self._recreate()

    def _repair(self) -> None:
        if not self.munged_processes():
            self.start_munge()
        if not self.controllers():
            self.start_controller()
        for node in NODES:
            if not self.daemons(node):
                self.start_node(node)
        until(lambda: set(self.states()) == set(NODES), 60, "the controller answers")
        self.run("scancel", "--user=root", "--full", "--signal=KILL")
        self.run("scancel", "--user=root")
        until(self._idle, 60, "both nodes are idle")

    def _idle(self) -> bool:
        states = self.states()
        for node, state in states.items():
            if "DRAIN" in state or "DOWN" in state:
                command = ["scontrol", "update", f"NodeName={node}", "State=RESUME"]
                subprocess.run(command, env={**os.environ, **self.environment}, capture_output=True, timeout=60)
        return states == dict.fromkeys(NODES, "IDLE")

    def _kill_strays(self) -> None:
        """Kill processes of attempts that tests have left: those with our mark, and only of this cluster."""
        for member in members():
            if member.process.variable("SLURM_CONF") == self.environment["SLURM_CONF"]:
                member.process.send(signal.SIGKILL)

    def _recreate(self) -> None:
        """Restart all daemons with an empty state."""
        for _ in range(3):
            self._kill_strays()
            nodes = [process for node in NODES for process in (*self.daemons(node), *self.steps(node))]
            self.kill([*self.controllers(), *nodes])
        shutil.rmtree(self.directory / "state")
        (self.directory / "state").mkdir()
        self.start_controller()
        for node in NODES:
            self.start_node(node)
        until(self._idle, SECONDS, f"idle nodes; {self.logs()}")

    def logs(self) -> str:
        """Return the ends of the daemons' logs."""
        return "\n".join(f"== {file.name}\n{file.read_text()[-2000:]}" for file in sorted(self.directory.glob("*.log")))


def _command(pid: int) -> list[str]:
    try:
        text = (PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return []
    return [word.decode(errors="replace") for word in text.rstrip(b"\0").split(b"\0")] if text else []


def parent_of(pid: int) -> int:
    try:
        return int((PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return [item.getsockname()[1] for item in sockets]
    finally:
        for item in sockets:
            item.close()
