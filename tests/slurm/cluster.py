"""A real Slurm cluster of two nodes on this machine: its own keys, ports and state, ready in about a second."""

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


def why_not() -> str | None:
    """Why there can be no cluster here, or None."""
    missing = [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]
    if missing:
        return f"Slurm is not installed: {', '.join(missing)} not found"
    return None if os.geteuid() == 0 else "a test cluster of Slurm needs root"


class Cluster:
    """Two `slurmd` on one host are two nodes. ``environment`` is what Slurm's commands need to find it."""

    controller = "127.0.0.1"

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = {"SLURM_CONF": str(directory / "slurm.conf")}
        self._warden = subprocess.Popen(
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
        until(lambda: self.states() == dict.fromkeys(NODES, "IDLE"), 30, f"idle nodes; {self.states()} {self.logs()}")

    def stop(self) -> None:
        """End everything: the warden does, once its input is closed."""
        assert self._warden.stdin is not None
        assert self._warden.stdout is not None
        self._warden.stdin.close()
        self._warden.stdout.close()
        self._warden.wait(30)

    def _configure(self) -> None:
        directory = self.directory
        (directory / "state").mkdir()
        port, *ports = _free_ports(3)
        nodes = "\n".join(self.node_line(name, port) for name, port in zip(NODES, ports, strict=True))
        where = {"host": socket.gethostname(), "controller": self.controller, "controller_port": port}
        text = CONF.format(**where, dir=directory, nodes=nodes)
        (directory / "slurm.conf").write_text(text)
        (directory / "cgroup.conf").write_text("CgroupAutomount=no\n")
        (directory / "gres.conf").write_text(f"NodeName=node[1-2] Name=gpu File={directory}/fakegpu[0-1]\n")
        for number in range(2):
            # Like /dev/null: enough to be leased. What is leased is tested, not that it is kept from others.
            os.mknod(directory / f"fakegpu{number}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))

    def node_line(self, name: str, port: int) -> str:
        """What slurm.conf has of a node."""
        return NODE.format(name=name, host=socket.gethostname(), address="127.0.0.1", port=port)

    def start_munge(self) -> None:
        """With the key that it had, where it had one."""
        directory = self.directory
        key = directory / "munge.key"
        if not key.exists():
            key.write_bytes(os.urandom(128))
            key.chmod(0o600)
        files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munge.pid", "log-file": "munge.log"}
        options = [f"--{name}={directory / file}" for name, file in {**files, "seed-file": "munge.seed"}.items()]
        (directory / "munge.socket").unlink(missing_ok=True)
        self.spawn("munge.out", "munged", "--foreground", "--force", "--num-threads=2", *options)
        until((directory / "munge.socket").exists, 10, "munged listens")

    def start_controller(self) -> None:
        self.spawn("slurmctld.out", "slurmctld", "-D", "-f", self.environment["SLURM_CONF"])

    def start_node(self, name: str) -> None:
        self.spawn(f"{name}.out", *self.node_command(name))

    def node_command(self, name: str) -> list[str]:
        """The node's slurmd."""
        return ["slurmd", "-D", "-f", self.environment["SLURM_CONF"], "-N", name]

    def spawn(self, log: str, program: str, *arguments: str) -> int:
        assert self._warden.stdin is not None
        assert self._warden.stdout is not None
        found = shutil.which(program, path=PATH)
        request = [str(self.directory / log), [found, *arguments]]
        self._warden.stdin.write(json.dumps(request).encode() + b"\n")
        self._warden.stdin.flush()
        return int(self._warden.stdout.readline())

    def run(self, *command: str, seconds: float = 20.0) -> str:
        """What one of Slurm's commands prints."""
        environment = {**os.environ, **self.environment, "PATH": PATH}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def states(self) -> dict[str, str]:
        """Node -> its state, as `scontrol` has it."""
        try:
            lines = self.run("scontrol", "show", "node", "-o").splitlines()
        except AssertionError:
            return {}
        fields = [dict(part.split("=", 1) for part in line.split() if "=" in part) for line in lines]
        return {each["NodeName"]: each["State"] for each in fields}

    def jobs(self) -> list[dict[str, Any]]:
        """Every job that Slurm still knows of."""
        found: list[dict[str, Any]] = json.loads(self.run("squeue", "--json", "-t", "all"))["jobs"]
        return found

    def drain(self, node: str) -> None:
        self.run("scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=test")

    def undrain(self, node: str) -> None:
        self.run("scontrol", "update", f"NodeName={node}", "State=RESUME")

    def controllers(self) -> list[ProcessIdentity]:
        """The controller's process."""
        return self._processes(lambda words: words[0].endswith("slurmctld"))

    def mungers(self) -> list[ProcessIdentity]:
        """munged's process."""
        mine = f"--socket={self.directory}/munge.socket"
        found = [ProcessIdentity.of(pid) for pid in all_pids() if mine in _command(pid)]
        return [process for process in found if process is not None]

    def daemons(self, node: str) -> list[ProcessIdentity]:
        """The node's slurmd."""
        return self._processes(lambda words: words[0].endswith("slurmd") and words[-1] == node)

    def steps(self, node: str) -> list[ProcessIdentity]:
        """The slurmstepd processes of the node. They overwrite their own environment; their children have it."""
        parents = {process: parent_of(process.pid) for pid in all_pids() if (process := ProcessIdentity.of(pid))}
        mine = {
            parent
            for process, parent in parents.items()
            if process.variable("SLURMD_NODENAME") == node
            and process.variable("SLURM_CONF") == self.environment["SLURM_CONF"]
        }
        return [each for each in parents if each.pid in mine and "slurmstepd" in " ".join(_command(each.pid))]

    def _processes(self, wanted: Any) -> list[ProcessIdentity]:
        found = []
        for pid in all_pids():
            words = _command(pid)
            mine = self.environment["SLURM_CONF"] in words
            if words and mine and wanted(words) and (identity := ProcessIdentity.of(pid)):
                found.append(identity)
        return found

    def remember(self, number: object) -> None:
        """Return once the controller has written down what it knows of the job: it does so every few seconds only."""
        began = time.time()
        self.run("scontrol", "update", f"JobId={number}", "AdminComment=remember")
        until(lambda: (self.directory / "state" / "job_state").stat().st_mtime > began, 20, "it is written down")

    def kill(self, processes: list[ProcessIdentity]) -> None:
        """SIGKILL, and return once they are gone."""
        for process in processes:
            process.send(signal.SIGKILL)
        until(lambda: not any(process.alive() for process in processes), 10, "they are gone")

    def heal(self) -> None:
        """Whatever a test did: a controller, two idle nodes, no job and nothing of one; if need be by a new cluster."""
        self._end_strays()
        try:
            self._mend()
        except (AssertionError, subprocess.TimeoutExpired) as why:
            print(f"the cluster is begun anew: {why}")
            self._begin_anew()

    def _mend(self) -> None:
        if not self.mungers():
            self.start_munge()
        if not self.controllers():
            self.start_controller()
        for node in NODES:
            if not self.daemons(node):
                self.start_node(node)
        until(lambda: set(self.states()) == set(NODES), 30, "the controller answers")
        self.run("scancel", "--user=root", "--full", "--signal=KILL")
        self.run("scancel", "--user=root")
        until(self._idle, 40, "both nodes are idle")

    def _idle(self) -> bool:
        """Whether both nodes are; one that is drained or down is asked back."""
        states = self.states()
        for node, state in states.items():
            if "DRAIN" in state or "DOWN" in state:
                command = ["scontrol", "update", f"NodeName={node}", "State=RESUME"]
                subprocess.run(command, env={**os.environ, **self.environment}, capture_output=True, timeout=20)
        return states == dict.fromkeys(NODES, "IDLE")

    def _end_strays(self) -> None:
        """Processes of attempts that no test looks after any more: by our mark, and only those of this cluster."""
        for member in members():
            if member.process.variable("SLURM_CONF") == self.environment["SLURM_CONF"]:
                member.process.send(signal.SIGKILL)

    def _begin_anew(self) -> None:
        """All daemons and steps, and what the controller remembers."""
        for _ in range(3):
            self._end_strays()
            nodes = [process for node in NODES for process in (*self.daemons(node), *self.steps(node))]
            self.kill([*self.controllers(), *nodes])
        shutil.rmtree(self.directory / "state")
        (self.directory / "state").mkdir()
        self.start_controller()
        for node in NODES:
            self.start_node(node)
        until(self._idle, 60, f"idle nodes; {self.states()} {self.logs()}")

    def logs(self) -> str:
        """The ends of the daemons' logs."""
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
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
